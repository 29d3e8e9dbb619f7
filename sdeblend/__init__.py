"""Blend diffusion models and know what the blend does.

``Preference`` -> ``Blend`` -> ``BackwardSDE`` -> ``solve``; ``Certificate`` and ``Correction`` come with it.
This package knows no backend: scores are functions (x, t) -> score. ``toy`` has mixtures with closed forms,
``stablediffusion`` has diffusers pipelines, ``proofs_checks`` verifies every statement.

Source: Cheng et al., Diffusion Blend, arXiv 2505.18547.
"""

from sdeblend.blend import Blend, Evaluation
from sdeblend.brownian import BrownianNoise
from sdeblend.certificate import Certificate, effective_sample_size
from sdeblend.correction import Correction, systematic_resample
from sdeblend.corrector import Corrector, place_moves
from sdeblend.grid import time_grid
from sdeblend.noise import BatchNoise, PerSampleNoise, ReplayNoise
from sdeblend.parametrisation import convert
from sdeblend.preference import Preference
from sdeblend.schedule import (
    SCHEDULES,
    KarrasVE,
    NoiseSchedule,
    RectifiedFlow,
    TrainedTable,
    VPCosine,
    VPLinear,
)
from sdeblend.score import Bound, ScoreFunction, ScoreStack, Stack
from sdeblend.sde import BackwardSDE
from sdeblend.select import OneMemberPerStep
from sdeblend.solve import Solution, State, solve, trajectory
from sdeblend.spot import SpotCheck, certify_one_member
from sdeblend.stacks import Concatenated, CountingStack
from sdeblend.steps import STEPS, Ancestral, EulerMaruyama, ExponentialMultistep, Heun, Step

__all__ = [
    "SCHEDULES",
    "STEPS",
    "Ancestral",
    "BackwardSDE",
    "BatchNoise",
    "Blend",
    "Bound",
    "BrownianNoise",
    "Certificate",
    "Concatenated",
    "Correction",
    "Corrector",
    "CountingStack",
    "EulerMaruyama",
    "Evaluation",
    "ExponentialMultistep",
    "Heun",
    "KarrasVE",
    "NoiseSchedule",
    "OneMemberPerStep",
    "PerSampleNoise",
    "Preference",
    "RectifiedFlow",
    "ReplayNoise",
    "ScoreFunction",
    "ScoreStack",
    "Solution",
    "SpotCheck",
    "Stack",
    "State",
    "Step",
    "TrainedTable",
    "VPCosine",
    "VPLinear",
    "certify_one_member",
    "convert",
    "effective_sample_size",
    "place_moves",
    "solve",
    "systematic_resample",
    "time_grid",
    "trajectory",
]
