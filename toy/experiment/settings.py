"""What a problem is blended with: methods, solver and sizes, checked, and the closed forms that follow from them.

With weights w, strength lambda and KL weight alpha, coefficients over (base, members) are c = (1 - lambda sum w,
lambda w_1, ...), the target is p_base exp(lambda r(w)/alpha) / Z, and the weights of the correction have
log E[W] = log Z - sum_i c_i log Z_i with Z_i those of the members.

Source: Diffusion Blend 2505.18547, equations of DB-MPA and DB-KLA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from sdeblend import SCHEDULES, STEPS, NoiseSchedule, Preference, Step, time_grid
from sdeblend.correct import CorrectionMode
from sdeblend.grid import Spacing
from sdeblend.select import Selection
from toy.mixtures.mixture import GaussianMixture
from toy.problems import Problem

MAX_STEPS: Final = 10_000
SAMPLES: Final = (10, 10_000_000)


@dataclass(frozen=True)
class Method:
    """What a method does.

    Attributes:
        correct: how the blend's weights are used, None without a blend.
        selection: how one member a step is drawn, None where all are evaluated.
    """

    correct: CorrectionMode | None = None
    selection: Selection | None = None


METHODS: Final[Mapping[str, Method]] = {
    "exact": Method(),
    "mpa": Method(correct="certify"),
    "mpa-corrected": Method(correct="resample"),
    "ls": Method(selection="systematic"),
    "ls-iid": Method(selection="independent"),
    "ls-shared": Method(selection="shared"),
}
# Exponential integrators run on the clock in which they are exact; the others on the time of the schedule.
_SPACINGS: Final[Mapping[str, Spacing]] = {"dpm-2m-sde": "log-snr", "dpm-2m": "log-snr", "heun": "log-snr"}


@dataclass(frozen=True)
class Settings:
    """How a problem is blended and sampled.

    Args:
        weights: w, one a reward in their order, or by name.
        strength: lambda; 1 is the strength the members were tuned at.
        methods: names of ``METHODS``; None: all that apply.
        schedule: a name of ``sdeblend.SCHEDULES``.
        solver: a name of ``sdeblend.STEPS``.
        spacing: of the grid, "uniform", "log-snr" or "karras"; None: what suits the solver.
        steps: number of steps, 2 to 10 000.
        samples: number of samples a method, 10 to 10 000 000.
        seed: of every random number, 0 to 2^63 - 1.

    Raises:
        ValueError: for a name that is not known or a number out of its range.
    """

    weights: Sequence[float] | Mapping[str, float]
    strength: float = 1.0
    methods: Sequence[str] | None = None
    schedule: str = "vp-linear"
    solver: str = "euler-maruyama"
    spacing: Spacing | None = None
    steps: int = 200
    samples: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name("schedule", self.schedule, SCHEDULES)
        _check_name("solver", self.solver, STEPS)
        for method in self.methods or ():
            _check_name("methods", method, METHODS)
        if self.methods is not None and not 0 < len(set(self.methods)) == len(self.methods):
            raise ValueError(f"methods must name at least one and none twice, got {list(self.methods)}; correct it")
        ranges = {"steps": (2, MAX_STEPS), "samples": SAMPLES, "seed": (0, 2**63 - 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}; choose one")


@dataclass(frozen=True)
class Prepared:
    """A problem and settings, checked and solved in closed form; nothing is sampled yet.

    Attributes:
        members: the tuned laws p_i by reward.
        target: p_base exp(lambda r(w)/alpha) / Z.
        log_normalizer: log Z of the target.
        blend_log_normalizer: log Z - sum_i c_i log Z_i, what log E[W] estimates.
        coefficients: c over (base, members), float64 (1 + m,).
        methods: names of the methods to run.
        schedule, step, grid: the solver's.
    """

    members: dict[str, GaussianMixture]
    target: GaussianMixture
    log_normalizer: float
    blend_log_normalizer: float
    coefficients: Tensor
    methods: tuple[str, ...]
    schedule: NoiseSchedule
    step: Step
    grid: Tensor


def prepare(problem: Problem, settings: Settings) -> Prepared:
    """Check a problem and its settings together, and solve what has a closed form.

    Args:
        problem: base, rewards and KL weight.
        settings: see there.

    Raises:
        ValueError: weights that do not fit the rewards, a tilt that does not exist (component and eigenvalue named),
            or a method that does not apply.
    """
    preference = Preference(_named_weights(settings.weights, problem.names), settings.strength)
    coefficients = preference.coefficients(problem.names)
    wanted = problem.reward(preference)
    with _about("the target of these weights"):
        target = _check_finite(problem.base.tilt(wanted, kl_weight=problem.kl_weight))
    members = {}
    for name in problem.names:
        with _about(f"the member tuned for {name!r}"):
            members[name] = _check_finite(problem.member(name))
    schedule, step = SCHEDULES[settings.schedule](), STEPS[settings.solver]()
    return Prepared(
        members=members,
        target=target,
        log_normalizer=problem.base.log_normalizer(wanted, kl_weight=problem.kl_weight),
        blend_log_normalizer=problem.blend_log_normalizer(coefficients),
        coefficients=coefficients,
        methods=_methods(settings, step, coefficients),
        schedule=schedule,
        step=step,
        grid=time_grid(schedule, settings.steps, settings.spacing or _SPACINGS.get(settings.solver, "uniform")),
    )


def _check_finite(law: GaussianMixture) -> GaussianMixture:
    if not all(bool(value.isfinite().all()) for value in (law.log_weights, law.mean, law.covariance)):
        raise ValueError("weights, mean and covariance must fit into float64, got some that do not; rescale")
    return law


def _methods(settings: Settings, step: Step, coefficients: Tensor) -> tuple[str, ...]:
    """Return the methods to run, or raise if one that was asked for does not apply."""
    if settings.methods is None:
        return tuple(name for name in METHODS if _obstacle(METHODS[name], settings, step, coefficients) is None)
    for name in settings.methods:
        obstacle = _obstacle(METHODS[name], settings, step, coefficients)
        if obstacle is not None:
            raise ValueError(f"method {name!r} {obstacle}")
    return tuple(settings.methods)


def _obstacle(method: Method, settings: Settings, step: Step, coefficients: Tensor) -> str | None:
    """Return why a method does not apply, None if it does."""
    if method.correct == "resample" and not step.stochastic:
        noisy = ", ".join(name for name, make in STEPS.items() if make().stochastic)
        return f"needs a solver with noise, got {settings.solver!r}; use {noisy}, or leave the method out"
    if method.selection is not None and bool((coefficients < 0).any()):
        shown = ", ".join(f"{c:g}" for c in coefficients.tolist())
        return (
            f"needs coefficients over base and members that are probabilities, got [{shown}]; lower the strength, "
            "or leave the method out"
        )
    return None


def _named_weights(weights: Sequence[float] | Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    if isinstance(weights, Mapping):
        return dict(weights)
    if len(weights) != len(names):
        raise ValueError(f"weights must be one a reward ({', '.join(names)}), got {len(weights)}; make them fit")
    return dict(zip(names, weights, strict=True))


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")


@contextmanager
def _about(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
