"""Blends on pipelines: attached to the pipeline's own run, or as scores on latents for the core's solver."""
