"""Adjoint matching: the lean adjoint is the gradient along the base's process, and training ends at the tilt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdeblend import VPLinear
from sdeblend.finetune.paths import MULTISTEP, draw_states, follow
from sdeblend.finetune.trainers.adjoint import AdjointMatching, AdjointSettings
from sdeblend.finetune.trainers.backprop import BackpropSettings, RewardBackprop
from sdeblend.reward import WeightedReward
from tests.support.finetune_models import Line, quadratic
from tests.support.strategies import close, generator, refuses
from toy.networks.tunable import MixtureTunable, reward_of
from toy.problems import gaussian_linear, line2
from toy.statements.recovery import recovered


def trainer(kl_weight: float = 0.5, **settings: object) -> AdjointMatching:
    problem = line2()
    model = MixtureTunable(problem.base, VPLinear(), width=32)
    reward = WeightedReward({"left": reward_of(problem.rewards["left"])})
    kept = {"kl_weight": kl_weight, "steps": 9, "group_size": 16, "learning_rate": 1e-3}
    return AdjointMatching(model, reward, AdjointSettings(**(kept | settings)))


class Nudged(MixtureTunable):
    """A base whose score is moved by a number of its own at each step."""

    def __init__(self, model: MixtureTunable, times: Tensor) -> None:
        super().__init__(model.mixture, model.schedule, width=32)
        self.times = times
        self.nudge = torch.zeros(len(times), dtype=torch.float64, requires_grad=True)

    def tuned(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        k = int((self.times == t[0]).nonzero())
        return self.base(x, t) - self.schedule.sigma(t[0]) * self.nudge[k]


def test_lean_adjoint_is_the_gradient_through_the_base() -> None:
    tuned = trainer()
    noise = torch.randn((9, 6, 1), generator=generator(0), dtype=torch.float64)
    tuned.model.residual.double()
    with torch.no_grad():
        states = draw_states(tuned.model, MULTISTEP, tuned.grid, noise, None)
    _, pulls, rewards = tuned.carry_back(states, None)
    # With no control yet, the pull of a step is the gradient in its score.
    nudged = Nudged(tuned.model, tuned.grid[:-1])
    run = follow(nudged, tuned.grid, noise, None)
    reward = tuned.reward(run.samples, None)
    close(reward.detach(), rewards, 1e-10)
    (gradient,) = torch.autograd.grad((-reward / 0.5).sum(), nudged.nudge)
    close(pulls.sum((1, 2)), gradient, 1e-8)
    # Without the step's memory of the posterior mean before, it is another one.
    for move in tuned.moves:
        object.__setattr__(move, "c", 0.0)
    forgetful = tuned.carry_back(states, None)[1].sum((1, 2))
    assert float((forgetful - gradient).abs().max()) > 0.01 * float(gradient.abs().max())


@pytest.mark.parametrize("shift", [0.0, 0.7, pytest.param(None, marks=pytest.mark.xfail(strict=True))])
def test_where_the_control_is_even_its_gradient_is_that_of_back_propagation(shift: float | None) -> None:
    # What the lean adjoint leaves out has the control's Jacobian as a factor. Its loss is a mean over the steps.
    found = []
    for kind, settings in ((AdjointMatching, AdjointSettings), (RewardBackprop, BackpropSettings)):
        model = Line(0.3)
        with torch.no_grad():
            model.shift.fill_(0.7 if shift is None else shift), model.slope.fill_(0.5 if shift is None else 0.0)
        tuned = kind(model, quadratic(1.0, 0.5), settings(kl_weight=0.5, steps=20, group_size=64, clip_norm=math.inf))
        tuned.iterate()
        found.append(torch.cat([model.shift.grad, model.slope.grad]))
    close(20 * found[0], found[1], 1e-4)


def test_pieces_do_not_change_the_adjoint() -> None:
    logs = [trainer(micro_batch=size).iterate() for size in (4096, 5)]
    assert logs[0]["reward"] == pytest.approx(logs[1]["reward"], abs=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_it_ends_at_the_tilt_of_the_stated_kl_weight(share: float) -> None:
    problem = gaussian_linear(1.0)
    model = MixtureTunable(problem.base, VPLinear(), width=32)
    reward = WeightedReward({"right": reward_of(problem.rewards["right"])})
    tuned = AdjointMatching(
        model, reward, AdjointSettings(kl_weight=1.0, steps=20, group_size=64, learning_rate=1e-2, share=share)
    )
    for _ in range(60):
        tuned.iterate()
    assert abs(recovered(model, problem.member("right"), count=2000).slope - 1) < 0.12
    assert abs(recovered(model, problem.member("right", 0.5), count=2000).slope - 1) > 0.12


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_settings_refuse(share: float) -> None:
    refuses(lambda: trainer(share=share), "share")


def test_a_reward_without_a_gradient_is_refused() -> None:
    tuned = trainer()
    tuned.reward = WeightedReward({"hard": lambda samples, condition: samples[:, 0].detach().sign()})
    refuses(tuned.iterate, "differentiable")
