"""One problem, every method: what each makes of the same preference, beside the exact target.

With weights w, strength lambda and KL weight alpha the target is p_base exp(lambda r(w)/alpha) / Z. All methods run
on the same grid, from the same start noise and with the same step noise, so that they differ by what they do:

    exact           the target's own score: the control, whose error is the solver's and the sampling's alone
    mpa             the blended score (DB-MPA, DB-KLA), with its certificate
    mpa-corrected   the same with Feynman-Kac resampling
    ls              one member a step, systematic (DB-MPA-LS); ls-iid: independent draws a sample; ls-shared: one
                    draw for the whole batch, as published

Two log normalisers are told apart: the target's, log Z = log E_base[exp(lambda r(w)/alpha)], and that of the
correction's weights, log E[W] = log Z - sum_i c_i log Z_i with Z_i those of the members, which a run estimates.

Source: Diffusion Blend 2505.18547, algorithms 1 to 3; ``sdeblend.correct`` for certificate and correction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeblend import BackwardSDE, Blend, Correction, OneMemberPerStep, ScoreFunction, State, trajectory
from sdeblend.certificate import WARN_ESS, WARN_NATS, Certificate
from toy import metrics
from toy.experiment.settings import METHODS, Prepared, Settings, prepare
from toy.mixtures.mixture import GaussianMixture
from toy.problems import Problem
from toy.scores.stack import mixture_score

# Streams of random numbers of one seed; all methods share the first.
_NOISE, _ANCESTORS, _MEMBERS, _EXACT, _FLOORS, _DIRECTIONS = range(6)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sampled:
    """What one method returned.

    Attributes:
        points: (B, d), float32.
        log_weights: (B,), or None if all count alike.
        families: which start each sample descends from, long (B,), or None if none was resampled.
    """

    points: Tensor
    log_weights: Tensor | None = None
    families: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished experiment.

    Attributes:
        problem, settings, prepared: what was run.
        report: the numbers, as ``run`` says; it can be written as JSON.
        samples: by method.
    """

    problem: Problem
    settings: Settings
    prepared: Prepared
    report: dict[str, Any]
    samples: dict[str, Sampled]


def run(problem: Problem, settings: Settings, *, progress: Progress | None = None) -> Outcome:
    """Run every method on a problem, and measure it against the exact target.

    The report has two keys. ``target``, in closed form: ``component_weights`` (K,), ``mean`` (d,), ``covariance``
    (d, d), ``mean_reward`` by reward, ``log_normalizer`` (log Z, in nats). ``methods``, for each: the same four
    measured, with standard errors under ``..._se``; ``mode_weight_tv`` (with ``_se``) and ``sliced_w2``, each with
    the ``_floor`` that exact samples have; ``certificate`` in nats (with ``_se``), or None and the reason in
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
    target, n, seed = prepared.target, settings.samples, settings.seed
    exact = target.sample(n, generator=_generator(seed, _EXACT))
    generator = _generator(seed, _FLOORS)
    floors = {
        "mode_weight_tv": float(metrics.mode_weight_tv_floor(target, n, generator=generator).value),
        # On a line one swapped sample between modes moves W2 most, so its floor needs more draws, which cost little.
        "sliced_w2": float(
            metrics.sliced_w2_floor(target, n, generator=generator, repeats=64 if target.dim == 1 else 4).value
        ),
    }
    report: dict[str, Any] = {"target": _target_report(problem, prepared), "methods": {}}
    samples = {}
    for name in prepared.methods:
        start = time.perf_counter()
        end = _solve(name, problem, settings, prepared, progress)
        seconds = time.perf_counter() - start
        samples[name] = _sampled(end, METHODS[name].correct == "resample")
        report["methods"][name] = {
            **_measured(samples[name], problem, target, exact, seed),
            "mode_weight_tv_floor": floors["mode_weight_tv"],
            "sliced_w2_floor": floors["sliced_w2"],
            **_bounds(name, end, prepared),
            "score_evaluations": end.evaluations,
            "seconds": seconds,
        }
    return Outcome(problem, settings, prepared, report, samples)


def _solve(
    name: str, problem: Problem, settings: Settings, prepared: Prepared, progress: Progress | None
) -> State:
    """Run one method to its end; start and step noise are the same for all, the rest has streams of its own."""
    method, schedule, grid, seed = METHODS[name], prepared.schedule, prepared.grid, settings.seed
    noise = _generator(seed, _NOISE)
    x = schedule.prior((settings.samples, problem.base.dim), generator=noise)
    stack, correct = problem.stack(schedule), None
    score: ScoreFunction
    if method.selection is not None:
        score = OneMemberPerStep(
            stack, prepared.coefficients, grid, len(x), method=method.selection, generator=_generator(seed, _MEMBERS)
        )
    elif name == "exact":
        score = mixture_score(prepared.target, schedule)
    else:
        score = Blend(stack, prepared.coefficients)
        if prepared.step.stochastic and method.correct is not None:
            correct = Correction(method.correct, generator=_generator(seed, _ANCESTORS))
    state = State(0, float(grid[0]), x)
    try:
        for state in trajectory(
            BackwardSDE(schedule, score), x, grid, step=prepared.step, noise=noise, correct=correct
        ):
            if progress is not None and state.step:
                progress(name, state.step, settings.steps)
    except FloatingPointError as error:
        raise FloatingPointError(f"method {name!r}: {error}") from error
    return state


def _sampled(end: State, weighted: bool) -> Sampled:
    """Return the samples of a run; weights that only certify belong to the certificate, not to the samples."""
    if not weighted or end.weights is None:
        return Sampled(end.x)
    return Sampled(end.x, end.log_weights, end.weights.ancestors if end.weights.resampled else None)


def _target_report(problem: Problem, prepared: Prepared) -> dict[str, Any]:
    target = prepared.target
    return {
        "component_weights": target.weights.tolist(),
        "mean": target.mean.tolist(),
        "covariance": target.covariance.tolist(),
        "mean_reward": {name: target.mean_reward(reward) for name, reward in problem.rewards.items()},
        "log_normalizer": prepared.log_normalizer,
    }


def _measured(
    sampled: Sampled, problem: Problem, target: GaussianMixture, exact: Tensor, seed: int
) -> dict[str, Any]:
    """Return what the samples of a method say, with standard errors."""
    x, log_w = sampled.points.double(), sampled.log_weights
    own = {"log_weights": log_w, "families": sampled.families}
    shares, tv = metrics.mode_weights(x, target, **own), metrics.mode_weight_tv(x, target, **own)
    mean, covariance = metrics.moments(x, **own)
    rewards = {name: metrics.mean_reward(x, reward, **own) for name, reward in problem.rewards.items()}
    distance = metrics.sliced_w2(x, exact, log_weights=log_w, generator=_generator(seed, _DIRECTIONS))
    return {
        "component_weights": shares.value.tolist(),
        "component_weights_se": shares.se.tolist(),
        "mean": mean.value.tolist(),
        "mean_se": mean.se.tolist(),
        "covariance": covariance.value.tolist(),
        "covariance_se": covariance.se.tolist(),
        "mean_reward": {name: float(estimate.value) for name, estimate in rewards.items()},
        "mean_reward_se": {name: float(estimate.se) for name, estimate in rewards.items()},
        "mode_weight_tv": float(tv.value),
        "mode_weight_tv_se": float(tv.se),
        "sliced_w2": distance,
    }


def _bounds(name: str, end: State, prepared: Prepared) -> dict[str, Any]:
    """Return what the weights of a blend say of it, None where there are none."""
    keys: tuple[str, ...] = ("certificate", "certificate_se", "certificate_note", "ess_fraction")
    keys += ("log_normalizer_estimate", "log_normalizer_estimate_se", "log_normalizer_closed_form")
    if end.weights is None:
        blend = METHODS[name].correct is not None
        note = "a certificate needs a solver with noise" if blend else "a certificate is of a blend of all members"
        return {**dict.fromkeys(keys), "certificate_note": note}
    certificate, (estimate, error) = end.weights.certificates()[0], end.weights.normalizers()[0]
    values = (
        _finite(certificate.value),
        _finite(certificate.standard_error),
        _certificate_note(certificate, METHODS[name].correct == "resample"),
        certificate.ess_fraction,
        _finite(estimate),
        _finite(error),
        prepared.blend_log_normalizer,
    )
    return dict(zip(keys, values, strict=True))


def _certificate_note(certificate: Certificate, corrected: bool) -> str | None:
    if not certificate.reliable:
        return "too few effective samples for a certificate with negative coefficients: draw more samples"
    if corrected:
        return "this certificate is of the blend without its correction"
    if certificate.warning is None:
        return None
    return (
        f"above {WARN_NATS:g} nats or below {WARN_ESS:.0%} effective samples: the blend alone may be far from its "
        "target, see mpa-corrected"
    )


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold; an unknown error is infinite and becomes None."""
    return value if value is not None and math.isfinite(value) else None


def _generator(seed: int, stream: int) -> torch.Generator:
    """Return the generator of one stream of a seed; streams of neighbouring seeds do not overlap."""
    state = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
