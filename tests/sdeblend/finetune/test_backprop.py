"""Reward back-propagation: its gradient is exact with all steps, cheaper and biased with the last few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdeblend import VPLinear, time_grid
from sdeblend.finetune.paths import Followed, charges, follow, log_snr_weights
from sdeblend.finetune.trainers.backprop import BackpropSettings, RewardBackprop
from sdeblend.reward import WeightedReward
from tests.support.strategies import close, generator, refuses
from toy import Problem
from toy.networks.tunable import ExactEps, MixtureTunable, reward_of
from toy.problems import gaussian_linear, line2
from toy.statements.recovery import recovered

SCHEDULE = VPLinear()
STEPS = 50


class Scaled(MixtureTunable):
    """The exact tilt in place of a tuned network, its control times a strength of its own at each step."""

    def __init__(self, problem: Problem, reward: str) -> None:
        super().__init__(problem.base, SCHEDULE)
        self.tilt = ExactEps(problem.member(reward), SCHEDULE)
        self.times = time_grid(SCHEDULE, STEPS, "log-snr")
        self.strength = torch.ones(STEPS, dtype=torch.float64, requires_grad=True)
        # Mean square of the control at each step of the last run.
        self.square = torch.zeros(STEPS, dtype=torch.float64)

    def tuned(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        k, base = int((self.times == t[0]).nonzero()), self.exact(x, t)
        control = self.tilt(x, t) - base
        self.square[k] = control.detach().square().sum(1).mean()
        return base + self.strength[k] * control

    def run(self, count: int, seed: int) -> Followed:
        noise = torch.randn((STEPS, count, *self.event), generator=generator(seed), dtype=torch.float64)
        return follow(self, self.times, noise, None)


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
    tuned.settings = tuned.settings.changed(clip_norm=float("inf"))
    tuned.iterate()
    return torch.cat([p.grad.flatten() for p in tuned.parameters])


def test_gradient_is_that_of_the_objective() -> None:
    tuned = trainer()
    noise = tuned.draw().noise

    def objective() -> float:
        with torch.no_grad():
            run = follow(tuned.model, tuned.grid, noise.double(), None)
            return float((run.kl - tuned.reward(run.samples, None) / 0.5).mean())

    for value in tuned.model.trainable().values():
        value.data = value.data.double()
    tuned.model.residual.double()
    run = follow(tuned.model, tuned.grid, noise.double(), None)
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


def test_kl_is_that_of_the_processes_and_not_of_the_steps() -> None:
    problem = line2(0.5)
    with torch.no_grad():
        run = Scaled(problem, "left").run(20_000, 2)
    exact = problem.base.tilt_kl(problem.rewards["left"], kl_weight=0.5)
    assert abs(float(run.kl.mean()) / exact - 1) < 0.04
    # The KL of the multistep's own paths, of which this is an estimate, is another number.
    assert float(run.log_ratio.mean()) / exact - 1 > 0.15


def test_charges_are_the_integral_over_log_snr() -> None:
    # A difference of scores that is 1 at all times, between the first time and the data.
    fine = torch.linspace(SCHEDULE.t_min, SCHEDULE.t_max, 200_001, dtype=torch.float64)
    exact = float(torch.trapezoid(SCHEDULE.diffusion_sq(fine), fine) + SCHEDULE.sigma(SCHEDULE.t_min) ** 2)
    for spacing in ("log-snr", "uniform"):
        value = charges(SCHEDULE, time_grid(SCHEDULE, 200, spacing))
        assert bool((value > 0).all())
        assert abs(float(value.sum()) / exact - 1) < 0.01


@pytest.mark.parametrize("reward", ["right", "left"])
def test_the_objective_is_stationary_at_the_tilt(reward: str) -> None:
    problem = line2(0.5)
    model = Scaled(problem, reward)
    runs = [model.run(12_000, seed) for seed in range(3, 7)]
    gain = torch.stack([problem.rewards[reward](run.samples).mean() / 0.5 for run in runs]).mean()
    kl, ratio = (torch.stack([getattr(run, name).mean() for run in runs]).mean() for name in ("kl", "log_ratio"))
    levels = SCHEDULE.log_snr(model.times[:-1])
    weight = log_snr_weights(SCHEDULE, model.times[:-1]) * model.square

    def newton(cost: Tensor) -> list[float]:
        """Return how far the best strength is from 1, in bands of the log-SNR, to first order."""
        (slope,) = torch.autograd.grad(cost - gain, model.strength, retain_graph=True)
        bands = [(levels > low) & (levels < low + 2) for low in (-4, -2, 0, 2, 4)]
        return [float(-slope[band].sum() / weight[band].sum()) for band in bands]

    # Where modes part the control is steep, and the KL of the multistep's own paths charges it too much.
    assert max(abs(step) for step in newton(kl)) < 0.12
    assert newton(ratio)[2] < -0.12


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
