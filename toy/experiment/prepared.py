"""A problem and settings, checked together, and what follows from them before anything is sampled.

With weights w, strength lambda and KL weight alpha, coefficients over (base, members) are c = (1 - lambda sum w,
lambda w_1, ...), the target is p_base exp(lambda r(w)/alpha) / Z, and the weights of the correction have
log E[W] = log Z - sum_i c_i log Z_i with Z_i those of the members.

Source: Diffusion Blend 2505.18547, equations of DB-MPA and DB-KLA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sdeblend.blend import Preference
from sdeblend.methods.case import NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method
from sdeblend.methods.registry import METHODS
from toy.evaluate.case import MixtureCase
from toy.experiment.settings import SHORT, USUAL, BlendSettings
from toy.mixtures.mixture import GaussianMixture
from toy.problems import Problem


@dataclass(frozen=True)
class Prepared:
    """A problem and settings, checked and solved in closed form; nothing is sampled yet.

    Attributes:
        problem, settings: what is to be run.
        case: the problem with its solver.
        preference: what is asked for.
        target: p_base exp(lambda r(w)/alpha) / Z.
        methods: by the names that they were asked for.
    """

    problem: Problem
    settings: BlendSettings
    case: MixtureCase
    preference: Preference
    target: GaussianMixture
    methods: Mapping[str, Method]


def prepare(problem: Problem, settings: BlendSettings) -> Prepared:
    """Check a problem and its settings together, and solve what has a closed form.

    Args:
        problem: base, rewards and KL weight.
        settings: see there.

    Raises:
        ValueError: weights that do not fit the rewards, a tilt that does not exist (component and eigenvalue named),
            or a method that does not apply.
    """
    preference = Preference(settings.weights, settings.strength)
    preference.coefficients(problem.names)  # which refuses weights of other rewards
    with about("the target of these weights"):
        target = _check_finite(problem.target(preference))
    for name in problem.names:
        with about(f"the member tuned for {name!r}"):
            _check_finite(problem.member(name))
    case = MixtureCase(problem, settings, problem.name)
    return Prepared(problem, settings, case, preference, target, _applicable(problem, settings, preference))


def _applicable(problem: Problem, settings: BlendSettings, preference: Preference) -> dict[str, Method]:
    """Return the methods to run; two steps of two samples say which apply.

    Raises:
        ValueError: one that was asked for does not.
    """
    short, draws = MixtureCase(problem, settings.changed(steps=2), problem.name), Draws(0, "", range(2))
    methods = {}
    for name in settings.methods or USUAL:
        method = METHODS[SHORT.get(name, name)]
        try:
            method(short, preference, draws)
        except NotApplicable as reason:
            if settings.methods is not None:
                shown = ", ".join(f"{c:g}" for c in preference.coefficients(problem.names).tolist())
                raise ValueError(
                    f"method {name!r} does not apply with solver {settings.solver!r} and coefficients [{shown}]: "
                    f"{reason}; leave it out"
                ) from None
            continue
        except FloatingPointError:  # the run itself will say where
            pass
        methods[name] = method
    return methods


def _check_finite(law: GaussianMixture) -> GaussianMixture:
    if not all(bool(value.isfinite().all()) for value in (law.log_weights, law.mean, law.covariance)):
        raise ValueError("weights, mean and covariance must fit into float64, got some that do not; rescale")
    return law


@contextmanager
def about(what: str) -> Iterator[None]:
    """Put what is being made before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
