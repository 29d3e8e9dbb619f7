"""``sdeblend generate``: images from a blend, on the command line."""
