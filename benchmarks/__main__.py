"""``python -m benchmarks``: all benchmarks, each writing its results file."""

from benchmarks import core

core.main()
