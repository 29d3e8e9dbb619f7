"""Mixtures as a backend of ``sdeblend evaluate``: every target is known, so every method is measured against it."""
