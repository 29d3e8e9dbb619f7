"""Solver steps, one file a family; all are pure and take injected noise."""

from collections.abc import Callable

from sdeblend.steps.ancestral import Ancestral
from sdeblend.steps.base import Move, Step, StepCoefficients, Walk
from sdeblend.steps.euler_maruyama import EulerMaruyama
from sdeblend.steps.exponential import ExponentialMultistep
from sdeblend.steps.heun import Heun

STEPS: dict[str, Callable[[], Step]] = {
    "euler-maruyama": EulerMaruyama,
    "ddim-ancestral": Ancestral,
    "dpm-2m-sde": ExponentialMultistep,
    "dpm-2m": lambda: ExponentialMultistep(stochastic=False),
    "heun": Heun,
}

__all__ = [
    "STEPS", "Ancestral", "EulerMaruyama", "ExponentialMultistep", "Heun", "Move", "Step", "StepCoefficients", "Walk",
]
