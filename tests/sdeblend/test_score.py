"""Scores: conversions between parametrisations, stacks, members evaluated row by row."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sdeblend import SCHEDULES, BackwardSDE, Bound, Concatenated, CountingStack, ScoreStack, Stack, VPLinear, convert
from sdeblend.parametrisation import conversion
from sdeblend.select import member_scores
from tests.support.core import relative, seeded
from toy.mixtures.mixture import GaussianMixture

NAMES = ["score", "eps", "x0", "v", "flow"]
PAIRS = list(product(NAMES, NAMES))
SHARES = [0.02, 0.3, 0.75, 0.98]


def time_at(schedule, share):
    return schedule.t_min * (schedule.t_max / schedule.t_min) ** share


def draw(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule_name", list(SCHEDULES))
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_round_trips(schedule_name, source, target):
    schedule = SCHEDULES[schedule_name]()
    x, value = draw((6, 3)), draw((6, 3), 1)
    for share in SHARES:
        t = time_at(schedule, share)
        there = convert(value, x, t, schedule, source=source, target=target)
        back = convert(there, x, t, schedule, source=target, target=source)
        # The way through x0 at high noise, or through eps at low noise, loses sigma/alpha or alpha/sigma.
        ratio = float(schedule.sigma(t) / schedule.alpha(t))
        assert relative(back, value) < 1e-10 * max(1.0, 1e-4 * max(ratio, 1 / ratio) ** 2), t


@pytest.mark.parametrize("schedule_name", list(SCHEDULES))
@pytest.mark.parametrize("share", SHARES)
def test_conversions_are_the_definitions(schedule_name, share):
    schedule = SCHEDULES[schedule_name]()
    t = time_at(schedule, share)
    x0, eps = draw((5, 2)), draw((5, 2), 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * x0 + sigma * eps
    truth = {
        "score": -eps / sigma,
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "flow": schedule.alpha_rate(t) * x0 + schedule.sigma_rate(t) * eps,
    }
    for source, target in PAIRS:
        got = convert(truth[source], x, t, schedule, source=source, target=target)
        torch.testing.assert_close(got, truth[target], rtol=1e-7, atol=1e-7 * float(truth[target].abs().max()))


@pytest.mark.parametrize("schedule_name", list(SCHEDULES))
def test_x0_is_the_posterior_mean_of_a_mixture(schedule_name):
    schedule = SCHEDULES[schedule_name]()
    mixture = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.2, 0.6])
    t = time_at(schedule, 0.6)
    x = draw((7, 2)) * schedule.prior_std()
    score = mixture.noised(schedule, t).score(x)
    x0 = convert(score, x, t, schedule, source="score", target="x0")
    torch.testing.assert_close(x0, mixture.posterior(x, schedule, t).mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x0, BackwardSDE(schedule, lambda x, t: score).denoised(x, t), rtol=1e-9, atol=1e-9)


def test_conversion_is_float64_and_shaped_as_time():
    t = torch.linspace(0.1, 0.9, 4)
    p, q = conversion(VPLinear(), t, "eps", "v")
    assert p.dtype == q.dtype == torch.float64 and p.shape == q.shape == (4,)


def test_convert_takes_stacks_and_keeps_the_dtype():
    x, members = draw((4, 3)).float(), draw((2, 4, 3), 1).float()
    got = convert(members, x, 0.4, VPLinear(), source="eps", target="x0")
    assert got.dtype == torch.float32 and got.shape == (2, 4, 3)
    one = convert(members[1], x, 0.4, VPLinear(), source="eps", target="x0")
    assert torch.equal(got[1], one)
    assert torch.equal(convert(x, x, 0.4, VPLinear(), source="v", target="v"), x)


@pytest.mark.parametrize(("source", "target"), [("noise", "eps"), ("eps", "epsilon")])
def test_unknown_parametrisation(source, target):
    with pytest.raises(ValueError, match="score, eps, x0, v, flow, got"):
        convert(draw((1, 1)), draw((1, 1)), 0.5, VPLinear(), source=source, target=target)


def linear(k):
    return lambda x, t: (k + 1) * x + float(t)


class Scaled(Bound):
    """A score bound to its batch: row i is multiplied by its own factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, t):
        return self.factor[:, None] * x

    def rows(self, index):
        return Scaled(self.factor[index])


def test_stack_and_concatenated_evaluate_what_is_asked_in_that_order():
    counts = [CountingStack(Stack([linear(0), linear(1)])), CountingStack(Stack([linear(2)])), Stack([linear(3)])]
    stack = Concatenated(counts)
    assert isinstance(stack, ScoreStack) and len(stack) == 4
    x, t = draw((5, 2)), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(stack(x, t), torch.stack([linear(k)(x, t) for k in range(4)]))
    torch.testing.assert_close(stack(x, t, [3, 0]), torch.stack([linear(3)(x, t), linear(0)(x, t)]))
    assert counts[0].evaluations == 2 * 5 + 5 and counts[0].calls == 2
    assert counts[1].evaluations == 5 and counts[1].calls == 1


def test_member_scores_evaluate_each_row_once_by_its_own_member():
    stack = CountingStack(Stack([linear(0), linear(1), linear(2)]))
    x, t = draw((6, 2)), torch.tensor(0.2, dtype=torch.float64)
    member = torch.tensor([2, 0, 2, 2, 0, 2])
    got = member_scores(stack, x, t, member)
    torch.testing.assert_close(got, torch.stack([linear(int(k))(x[i], t) for i, k in enumerate(member)]))
    assert stack.evaluations == 6
    member_scores(stack, x, t, torch.ones(6, dtype=torch.long))
    assert stack.evaluations == 12 and stack.calls == 3


def test_member_scores_restrict_bound_functions_to_their_rows():
    factors = torch.arange(1.0, 7.0, dtype=torch.float64)
    stack = CountingStack(Concatenated([Stack([Scaled(factors)]), Stack([linear(0), Scaled(10 * factors)])]))
    x, t = draw((6, 2)), torch.tensor(0.0, dtype=torch.float64)
    member = torch.tensor([0, 2, 1, 0, 2, 2])
    scale = torch.where(member == 0, factors, torch.where(member == 1, 1.0, 10 * factors))
    torch.testing.assert_close(member_scores(stack, x, t, member), scale[:, None] * x)
    assert stack.evaluations == 6
    index = torch.tensor([4, 1])
    torch.testing.assert_close(stack.rows(index)(x[index], t, [2])[0], 10 * factors[index, None] * x[index])
    assert stack.evaluations == 8


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Stack([]), ValueError, "at least one"),
        (lambda: Stack([linear(0), 3.0]), TypeError, "float at 1"),
        (lambda: BackwardSDE("vp-linear", linear(0)), TypeError, "NoiseSchedule first, got str"),
        (lambda: BackwardSDE(VPLinear(), 1.0), TypeError, "score function"),
    ],
)
def test_wrong_kinds_are_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_backward_sde_is_its_formulas():
    schedule = VPLinear()
    sde = BackwardSDE(schedule, linear(1))
    x, t = draw((4, 2)), 0.37
    beta = 0.1 + 19.9 * t
    score = 2 * x + t
    torch.testing.assert_close(sde.drift(x, t), -beta / 2 * x - beta * score)
    assert float(sde.diffusion(t)) == pytest.approx(beta**0.5)
