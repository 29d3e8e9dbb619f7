"""Speed and memory, as ratios against a named peer in one run; results are kept in ``benchmarks/results``."""
