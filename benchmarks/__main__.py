"""``python -m benchmarks``: all benchmarks, each writing its results file."""

from benchmarks import core, stable_diffusion

core.main()
stable_diffusion.main()
