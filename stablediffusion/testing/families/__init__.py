"""Tiny pipelines, one row a family: which networks it has, and what its classes are called.

Random weights make predictions of order one, so that members really differ.
"""

from __future__ import annotations

from stablediffusion.testing.families import flow, transformers, unets, video

FAMILIES = {name: tiny for group in (unets, flow, transformers, video) for name, tiny in group.FAMILIES.items()}
