"""LoRA adapters on a pipeline's networks: their files, members of a blend, switching, averaging, side by side."""
