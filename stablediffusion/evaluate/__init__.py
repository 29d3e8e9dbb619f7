"""Diffusers pipelines as a backend of ``sdeblend evaluate``."""

from stablediffusion.evaluate.backend import build

__all__ = ["build"]
