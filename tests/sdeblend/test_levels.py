"""The certificate at a noise level, and correction down to one: against the plain run, and what is said of it."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from sdeblend import (
    BackwardSDE,
    Blend,
    Correction,
    Preference,
    VPLinear,
    correct,
    solve,
    time_grid,
    trajectory,
)
from sdeblend.correct import Weights, log_mean_exp
from tests.support.core import Z, seeded
from toy.problems import line2

SCHEDULE = VPLinear()
PROBLEM, PREFERENCE = line2(0.25), Preference({"right": 0.5, "left": 0.5})
GRID = time_grid(SCHEDULE, 40)
LEVELS = (-SCHEDULE.log_snr(GRID[1:]) / 2).exp().tolist()
SDE = BackwardSDE(SCHEDULE, Blend(PROBLEM.stack(SCHEDULE), PREFERENCE))


def run(correction="certify", batch=1000, **options):
    x = SCHEDULE.prior((batch, 1), generator=seeded(1), dtype=torch.float64)
    return solve(SDE, x, GRID, noise=seeded(2), correct=correction, **options)


def resampling(**options):
    return Correction("resample", generator=seeded(5), threshold=0.9, **options)


def states(correction):
    x = SCHEDULE.prior((1000, 1), generator=seeded(1), dtype=torch.float64)
    return list(trajectory(SDE, x, GRID, noise=seeded(2), correct=correction))


def test_a_curve_is_what_would_have_been_certified_there():
    certificate = run().certificate
    curve = certificate.curve
    for row, (state, level) in enumerate(zip(states("certify")[1:], LEVELS, strict=True)):
        then, there = state.certificates[0], certificate.at(level)
        assert there.value == pytest.approx(then.value, rel=1e-12)
        assert (there.standard_error, there.ess_fraction) == (then.standard_error, then.ess_fraction)
        assert torch.equal(there.per_sample, then.per_sample)
        assert [float(column[row]) for column in curve] == pytest.approx(
            [level, then.value, then.standard_error, then.ess_fraction, then.needed]
        )
    assert certificate.level == 0 and certificate.at(0).value == certificate.value
    # between two levels it is that of the coarser one, all of whose steps end at it or above
    between = (LEVELS[20] + LEVELS[21]) / 2
    assert certificate.at(between).level == LEVELS[20] and certificate.at(between).steps == 21
    assert bool((curve.nats.diff() > -5 * curve.standard_error[1:]).all())  # it grows
    again = pickle.loads(pickle.dumps(certificate))
    assert again.at(between).value == certificate.at(between).value


@pytest.mark.parametrize("steps", [30, 34])
def test_down_to_a_level_everything_belongs_to_it(steps):
    level = LEVELS[steps - 1]
    plain, then = run(), states("certify")[steps]
    part = run(Correction(down_to=level))
    assert torch.equal(part.samples, plain.samples)
    assert torch.equal(part.log_weights, then.log_weights) and not torch.equal(part.log_weights, plain.log_weights)
    assert part.certificate.value == pytest.approx(then.certificates[0].value, rel=1e-12)
    assert part.certificate.level == level and part.certificate.at(0).value == plain.certificate.value
    assert part.log_normalizer == pytest.approx(log_mean_exp(then.log_weights)[0])
    assert f"at noise level {level:.3g}" in str(part.certificate) and "noise level" not in str(plain.certificate)
    assert len(part.notes) == 1 and f"down to noise level {level:g}" in part.notes[0]
    assert part.certificate.profile.shape == (40,)


def test_resampling_down_to_a_level_ends_there():
    level = LEVELS[34]
    full, part = run(resampling()), run(resampling(down_to=level))
    assert max(part.resampled) <= 35 < max(full.resampled)
    assert part.resampled == [n for n in full.resampled if n <= 35]
    assert float(part.log_weights.std()) > 0  # gathered since the last resampling, down to the level


def test_a_resampled_run_has_the_curve_of_the_plain_blend():
    plain, resampled = (run(c, batch=8000).certificate for c in ("certify", resampling()))
    for level in (LEVELS[32], LEVELS[35], 0.0):
        one, two = plain.at(level), resampled.at(level)
        allowed = Z * math.hypot(one.standard_error, two.standard_error)
        assert abs(one.value - two.value) < allowed < 0.5 * one.value
        assert abs(one.ess_fraction - two.ess_fraction) < 0.1
    assert plain.at(LEVELS[32]).value < 0.5 * plain.value  # the levels are told apart


def test_very_many_samples_thin_the_curve_and_keep_its_end(monkeypatch):
    whole = run(Correction(down_to=LEVELS[30])).certificate
    monkeypatch.setattr(correct, "KEPT", 7000)  # seven steps of a thousand
    thin = run(Correction(down_to=LEVELS[30])).certificate
    assert len(whole.curve.level) == 40 and 3 <= len(thin.curve.level) <= 7
    assert thin.value == whole.value and thin.level == LEVELS[30]
    assert thin.at(0).value == whole.at(0).value and set(thin.curve.level.tolist()) < set(LEVELS)


def test_what_has_no_level_is_named():
    weights = Weights(Correction(), 4, torch.device("cpu"), True)
    weights.add(torch.ones(4), 1.0, 0.5)
    certificate = weights.certificates()[0]
    assert certificate.level is None and "noise level" not in str(certificate)
    for ask in (lambda: certificate.curve, lambda: certificate.at(0.1)):
        with pytest.raises(ValueError, match="told its levels"):
            ask()
    with pytest.raises(ValueError, match="knows its noise levels, got none"):
        Weights(Correction(down_to=0.1), 4, torch.device("cpu"), True)
    with pytest.raises(ValueError, match="one of at most"):
        run().certificate.at(1e9)
    with pytest.raises(ValueError, match=r"got 1e\+09 where the first ends at"):
        run(Correction(down_to=1e9))
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="down_to must be a noise level"):
            Correction(down_to=bad)
