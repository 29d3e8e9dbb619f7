"""Adjoint matching: the lean adjoint is the gradient along the base's process, and training ends at the tilt."""

from __future__ import annotations

import pytest
import torch

from sdeblend import VPLinear
from sdeblend.finetune.adjoint import AdjointMatching, AdjointSettings
from sdeblend.finetune.process import draw_paths, follow
from sdeblend.finetune.reward import WeightedReward
from tests.strategies import close, generator, refuses
from toy.finetune import MixtureTunable, reward_of
from toy.problems import gaussian_linear, line2
from toy.recovery import recovered


def trainer(kl_weight: float = 0.5, **settings: object) -> AdjointMatching:
    problem = line2()
    model = MixtureTunable(problem.base, VPLinear(), width=32)
    reward = WeightedReward({"left": reward_of(problem.rewards["left"])})
    kept = {"kl_weight": kl_weight, "steps": 9, "group_size": 16, "learning_rate": 1e-3}
    return AdjointMatching(model, reward, AdjointSettings(**(kept | settings)))


def test_lean_adjoint_is_the_gradient_through_the_base() -> None:
    tuned = trainer()
    tuned.model.residual.double()
    noise = torch.randn((9, 6, 1), generator=generator(0), dtype=torch.float64)
    with torch.no_grad():
        paths = draw_paths(tuned.model, tuned.moves, noise, None)
    _, adjoints = tuned.carry_back(paths.states, None)
    # With no control yet, x_{k+1} moves with the noise of step k: d loss / d z_k = G_k a_{k+1}.
    noise.requires_grad_()
    run = follow(tuned.model, tuned.moves, noise, None)
    (-tuned.reward(run.samples, None) / 0.5).sum().backward()
    g = torch.tensor([move.g for move in tuned.moves[:-1]], dtype=torch.float64)
    close(g[:, None, None] * adjoints, noise.grad[1:], 1e-8)
    # Without the step's memory of the posterior mean before, it is another one.
    for move in tuned.moves:
        object.__setattr__(move, "c", 0.0)
    forgetful = tuned.carry_back(paths.states, None)[1]
    assert float((forgetful - adjoints).abs().max()) > 0.01 * float(adjoints.abs().max())


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
