"""States are snapshots, and a run keeps no autograd graph unless it is asked for one."""

from __future__ import annotations

import pytest
import torch

from sdeblend import (
    BackwardSDE,
    Blend,
    Correction,
    ExponentialMultistep,
    Preference,
    Stack,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from tests.support.core import seeded
from toy.problems import line2

SCHEDULE = VPLinear()
GRID = time_grid(SCHEDULE, 30)
CORRECTIONS = {"certify": "certify", "resample": Correction("resample", threshold=0.9, generator=seeded(3))}


def told(state):
    """Return everything that a state says, as it is now."""
    weights, certificate = state.weights, state.certificates[0]
    return (
        state.x.clone(), state.log_weights.clone(), weights.path.clone(), weights.ancestors.clone(),
        certificate.per_sample.clone(), certificate.profile.clone(), certificate.value, certificate.ess_fraction,
        certificate.samples, list(weights.resampled), weights.normalizers(),
    )  # fmt: skip


@pytest.mark.parametrize("correct", CORRECTIONS)
@pytest.mark.parametrize("step", [None, ExponentialMultistep()])
def test_a_state_is_a_snapshot(correct, step):
    blend = Blend(line2().stack(SCHEDULE), Preference({"left": 0.5, "right": 0.5}))
    x = SCHEDULE.prior((200, 1), generator=seeded(), dtype=torch.float64)
    states, seen = [], []
    run = trajectory(
        BackwardSDE(SCHEDULE, blend), x, GRID, noise=seeded(1), step=step, correct=CORRECTIONS[correct]
    )
    for state in run:
        states.append(state)
        seen.append(told(state))
    for state, before in zip(states, seen, strict=True):
        for now, then in zip(told(state), before, strict=True):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    # at the start nothing is certified yet, and what is known grows with the steps
    first, middle, last = (states[n].certificates[0] for n in (0, 15, -1))
    assert first.value == 0 and len(first.profile) == 0 and not states[0].weights.resampled
    assert len(middle.profile) == 15 and len(last.profile) == 30 and last.value > 0.1
    assert bool(states[-1].weights.resampled) == (correct == "resample")


class Net(torch.nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place = torch.nn.Parameter(torch.tensor(place))

    def forward(self, x, t):
        return self.place - x


def run(score, x=None, **options):
    x = SCHEDULE.prior((4, 2), generator=seeded()) if x is None else x
    return solve(BackwardSDE(SCHEDULE, score), x, GRID, noise=seeded(1), **options).samples


def test_a_module_as_a_score_keeps_no_graph():
    for score in (Net(0.5), Blend([Net(0.5), Net(-1.0)], Preference([0.4])), Stack([Net(0.5)])):
        out = run(score) if not isinstance(score, Stack) else run(Blend(score, [1.0]))
        assert not out.requires_grad and out.grad_fn is None
    for state in trajectory(BackwardSDE(SCHEDULE, Net(0.5)), torch.ones(4, 2), GRID, noise=seeded()):
        assert state.x.grad_fn is None and torch.is_grad_enabled()


def test_gradients_are_there_when_asked_for():
    net = Net(0.5)
    run(net, gradients=True).sum().backward()
    assert net.place.grad is not None and float(net.place.grad) != 0
    x = SCHEDULE.prior((4, 2), generator=seeded()).requires_grad_()
    run(Net(0.5), x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())
    assert run(Net(0.5), x.detach().requires_grad_(), gradients=False).grad_fn is None
    with torch.no_grad():
        assert run(Net(0.5), x.detach().requires_grad_()).grad_fn is None


@pytest.mark.parametrize("rows", [False, True])
def test_weights_have_the_gradient_of_the_samples(rows):
    # against central differences of the same run, in float64
    x = SCHEDULE.prior((5, 1), generator=seeded(), dtype=torch.float64)
    scores = [lambda x, t, k=k: k - x for k in (0.0, 1.0, -3.0)]

    def end(w):
        blend = Blend(Stack(scores, ("right", "left")), Preference({"right": w, "left": 1 - w}))
        return run(blend, x).mean()

    w = torch.full((5,) if rows else (), 0.4, dtype=torch.float64, requires_grad=True)
    end(w).backward()
    with torch.no_grad():
        expected = (end(w + 1e-4) - end(w - 1e-4)) / 2e-4
    assert float(w.grad.sum()) == pytest.approx(float(expected), rel=1e-6)


def test_a_weight_of_zero_has_its_gradient():
    x = SCHEDULE.prior((5, 1), generator=seeded(), dtype=torch.float64)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    run(Blend([lambda x, t: -x, lambda x, t: 1 - x], Preference([w])), x).mean().backward()
    assert float(w.grad) > 0.1
