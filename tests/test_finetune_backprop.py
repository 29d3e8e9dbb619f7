"""Reward back-propagation: its gradient is exact with all steps, cheaper and biased with the last few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdeblend import VPLinear
from sdeblend.finetune.backprop import BackpropSettings, RewardBackprop
from sdeblend.finetune.process import follow
from sdeblend.finetune.reward import WeightedReward
from tests.strategies import close, generator, refuses
from toy.finetune import MixtureTunable, reward_of
from toy.problems import gaussian_linear, line2
from toy.recovery import recovered


def trainer(kl_weight: float = 0.5, **settings: object) -> RewardBackprop:
    problem = line2()
    model = MixtureTunable(problem.base, VPLinear(), width=32)
    with torch.no_grad():
        for value in model.trainable().values():
            value.add_(0.03 * torch.randn(value.shape, generator=generator(1)))
    reward = WeightedReward({"left": reward_of(problem.rewards["left"])})
    kept = {"kl_weight": kl_weight, "steps": 8, "group_size": 16, "learning_rate": 1e-3}
    return RewardBackprop(model, reward, BackpropSettings(**(kept | settings)))


def gradients(tuned: RewardBackprop) -> Tensor:
    """Return the gradient of one iteration, flat; it is left in place by the descent step."""
    tuned.settings.__dict__["clip_norm"] = float("inf")
    tuned.iterate()
    return torch.cat([p.grad.flatten() for p in tuned.parameters])


def test_gradient_is_that_of_the_objective() -> None:
    tuned = trainer()
    noise = tuned.draw().noise

    def objective() -> float:
        with torch.no_grad():
            run = follow(tuned.model, tuned.moves, noise.double(), None)
            return float((run.kl - tuned.reward(run.samples, None) / 0.5).mean())

    for value in tuned.model.trainable().values():
        value.data = value.data.double()
    tuned.model.residual.double()
    run = follow(tuned.model, tuned.moves, noise.double(), None)
    (run.kl - tuned.reward(run.samples, None) / 0.5).mean().backward()
    place = tuned.parameters[-1]
    step = 1e-5
    numeric = []
    for sign in (1, -1):
        with torch.no_grad():
            place.flatten()[0].add_(sign * step)
        numeric.append(objective())
        with torch.no_grad():
            place.flatten()[0].sub_(sign * step)
    slope = (numeric[0] - numeric[1]) / (2 * step)
    assert abs(slope - float(place.grad.flatten()[0])) < 1e-5 * max(1.0, abs(slope))


def test_truncation_changes_the_gradient_and_recomputing_does_not() -> None:
    whole = gradients(trainer())
    close(gradients(trainer(recompute=True)), whole, 1e-5)
    close(gradients(trainer(last=8)), whole, 1e-6)
    close(gradients(trainer(micro_batch=5)), whole, 1e-4)
    short = gradients(trainer(last=2))
    assert float((short - whole).norm()) > 0.05 * float(whole.norm())


def test_a_truncated_gradient_states_no_kl_weight() -> None:
    assert trainer().calibrated
    assert not trainer(last=3).calibrated
    assert not trainer(random=True).calibrated
    first, second = trainer(last=3, random=True), trainer(last=3, random=True)
    assert [first.iterate() for _ in range(3)] == [second.iterate() for _ in range(3)]


def test_it_ends_at_the_tilt_of_the_stated_kl_weight() -> None:
    problem = gaussian_linear(1.0)
    model = MixtureTunable(problem.base, VPLinear(), width=32)
    reward = WeightedReward({"right": reward_of(problem.rewards["right"])})
    tuned = RewardBackprop(
        model, reward, BackpropSettings(kl_weight=1.0, steps=20, group_size=64, learning_rate=1e-2)
    )
    for _ in range(60):
        tuned.iterate()
    assert abs(recovered(model, problem.member("right"), count=2000).slope - 1) < 0.12
    assert abs(recovered(model, problem.member("right", 0.5), count=2000).slope - 1) > 0.12


@pytest.mark.parametrize("last", [-1, 9])
def test_settings_refuse(last: int) -> None:
    refuses(lambda: trainer(last=last), "last")


def test_a_reward_without_a_gradient_is_refused() -> None:
    tuned = trainer()
    tuned.reward = WeightedReward({"hard": lambda samples, condition: samples[:, 0].detach().sign()})
    refuses(tuned.iterate, "differentiable")
