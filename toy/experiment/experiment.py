"""One problem, every method: what each makes of the same preference, beside the exact target.

With weights w, strength lambda and KL weight alpha the target is p_base exp(lambda r(w)/alpha) / Z. Methods are those
of ``sdeblend.methods``, on the same grid, from the same start noise and with the same step noise, so that they differ
by what they do; "exact", the target's own score, is the control, whose error is the solver's and the sampling's alone.

Two log normalisers are told apart: the target's, log Z = log E_base[exp(lambda r(w)/alpha)], and that of the
correction's weights, log E[W] = log Z - sum_i c_i log Z_i with Z_i those of the members, which a run estimates.

Source: Diffusion Blend 2505.18547, algorithms 1 to 3; ``sdeblend.correct`` for certificate and correction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdeblend.certificate import WARN_ESS, WARN_NATS
from sdeblend.methods.case import Drawn
from sdeblend.methods.draws import Draws
from toy import metrics
from toy.experiment.prepared import Prepared, prepare
from toy.experiment.settings import BlendSettings
from toy.mixtures.mixture import GaussianMixture
from toy.problems import Problem

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Experiment(Prepared):
    """A finished experiment.

    Attributes:
        report: the numbers, as ``run`` says; it can be written as JSON.
        samples: by method.
    """

    report: dict[str, Any]
    samples: Mapping[str, Drawn]


def run(problem: Problem, settings: BlendSettings, *, progress: Progress | None = None) -> Experiment:
    """Run every method on a problem, and measure it against the exact target.

    The report has two keys. ``target``, in closed form: ``component_weights`` (K,), ``mean`` (d,), ``covariance``
    (d, d), ``mean_reward`` by reward, ``log_normalizer`` (log Z, in nats). ``methods``, for each: the same four
    measured, with standard errors under ``..._se``; ``mode_weight_tv`` (with ``_se``) and ``sliced_w2``, each with
    the ``_floor`` that as many exact samples have; ``certificate`` in nats (with ``_se``), or None and the reason in
    ``certificate_note``; ``ess_fraction`` without resampling; ``log_normalizer_estimate`` (log E[W], with ``_se``)
    beside ``log_normalizer_closed_form``; ``score_evaluations``, of members a sample; ``seconds`` of sampling.
    What does not apply is None. Standard errors of resampled samples are those of their families.

    Args:
        problem: base, rewards and KL weight.
        settings: see there.
        progress: called with (method, steps done, steps in all) after each step.

    Returns:
        the report and the samples; nothing but ``seconds`` depends on anything but the arguments.

    Raises:
        ValueError: as ``prepare``.
        FloatingPointError: a state that is no longer finite; names method, step, time and sample.
    """
    prepared = prepare(problem, settings)
    case, preference, target = prepared.case, prepared.preference, prepared.target
    draws = Draws(settings.seed, "", range(settings.samples))
    report: dict[str, Any] = {
        "target": {
            "component_weights": target.weights.tolist(),
            "mean": target.mean.tolist(),
            "covariance": target.covariance.tolist(),
            "mean_reward": {name: target.mean_reward(reward) for name, reward in problem.rewards.items()},
            "log_normalizer": problem.base.log_normalizer(problem.reward(preference), kl_weight=problem.kl_weight),
        },
        "methods": {},
    }
    samples: dict[str, Drawn] = {}
    for name, method in prepared.methods.items():
        case.progress = None if progress is None else partial(progress, name)
        start, drawing = time.perf_counter(), draws.seconds
        try:
            drawn = samples[name] = method(case, preference, draws)
        except FloatingPointError as error:
            raise FloatingPointError(f"method {name!r}: {error}") from error
        seconds = time.perf_counter() - start - (draws.seconds - drawing)
        distances = case.measure(drawn, preference)
        report["methods"][name] = {
            **_measured(drawn, problem, target),
            "mode_weight_tv_floor": distances["mode TV"].floor,
            "sliced_w2": distances["sliced W2"].value,
            "sliced_w2_floor": distances["sliced W2"].floor,
            **_bounds(name, prepared, drawn),
            "score_evaluations": drawn.model_calls,
            "seconds": seconds,
        }
    return Experiment(**vars(prepared), report=report, samples=samples)


def _measured(drawn: Drawn, problem: Problem, target: GaussianMixture) -> dict[str, Any]:
    """Return what the samples of a method say, with standard errors."""
    x, own = drawn.samples.double(), {"log_weights": drawn.log_weights, "families": drawn.ancestors}
    mean, covariance = metrics.moments(x, **own)
    found = {
        "component_weights": metrics.mode_weights(x, target, **own),
        "mean": mean,
        "covariance": covariance,
        "mode_weight_tv": metrics.mode_weight_tv(x, target, **own),
    }
    rewards = {name: metrics.mean_reward(x, reward, **own) for name, reward in problem.rewards.items()}
    measured: dict[str, Any] = {}
    for key, estimate in found.items():
        measured |= {key: estimate.value.tolist(), f"{key}_se": estimate.se.tolist()}
    measured["mean_reward"] = {name: float(estimate.value) for name, estimate in rewards.items()}
    measured["mean_reward_se"] = {name: float(estimate.se) for name, estimate in rewards.items()}
    return measured


def _bounds(name: str, prepared: Prepared, drawn: Drawn) -> dict[str, Any]:
    """Return what the weights of a blend say of it, None where there are none."""
    found = None if drawn.solution is None else drawn.solution.certificate
    note, known = None, None
    if found is None:
        blend = name in ("mpa", "mpa-moves", "mpa-corrected") and not prepared.case.step.stochastic
        note = "a certificate needs a solver with noise" if blend else "a certificate is of a blend of all members"
    else:
        known = prepared.problem.blend_log_normalizer(prepared.preference)
        if not found.reliable:
            note = "too few effective samples for a certificate with negative coefficients: draw more samples"
        elif drawn.log_weights is not None:
            note = "this certificate is of the blend without its correction"
        elif found.warning is not None:
            note = (
                f"above {WARN_NATS:g} nats or below {WARN_ESS:.0%} effective samples: the blend alone may be far from "
                "its target, see mpa-corrected"
            )
    return {
        "certificate": _finite(drawn.facts.get("certificate")),
        "certificate_se": _finite(drawn.facts.get("certificate_se")),
        "certificate_note": note,
        "ess_fraction": drawn.facts.get("ess"),
        "log_normalizer_estimate": _finite(drawn.facts.get("log_normalizer")),
        "log_normalizer_estimate_se": _finite(drawn.facts.get("log_normalizer_se")),
        "log_normalizer_closed_form": known,
    }


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold; an unknown error is infinite and becomes None."""
    return value if value is not None and math.isfinite(value) else None
