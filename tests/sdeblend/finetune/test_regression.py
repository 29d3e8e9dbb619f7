"""The regression trainer: the identity it rests on by quadrature, its weights, its log ratio, and where it ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdeblend import VPLinear
from sdeblend.finetune.paths import follow
from sdeblend.finetune.trainers.regression import RegressionSettings, RewardRegression, excess_weights, step_size
from sdeblend.reward import WeightedReward
from tests.support.strategies import close, generator, refuses
from toy import GaussianMixture, QuadraticReward
from toy.networks.tunable import MixtureTunable, reward_of
from toy.problems import gaussian_linear, line2
from toy.statements.recovery import recovered

SCHEDULE = VPLinear()
NODES = torch.linspace(-6, 6, 4001, dtype=torch.float64)


def trainer(kl_weight: float = 0.5, reward: str = "left", **settings: object) -> RewardRegression:
    problem = line2()
    model = MixtureTunable(problem.base, SCHEDULE, width=64)
    return RewardRegression(
        model, WeightedReward({reward: reward_of(problem.rewards[reward])}),
        RegressionSettings(**({"kl_weight": kl_weight, "learning_rate": 3e-3} | settings)),
    )  # fmt: skip


def posterior_mean(log_density: Tensor, values: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Return E[values(x_0) | x_t = x] by quadrature over NODES, under the law of density exp(log_density)."""
    weights = (log_density - (x[:, None] - a * NODES).square() / (2 * s * s)).softmax(1)
    return (weights * values).sum(1)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.6])
def test_the_weighted_regression_gives_the_tilt_from_any_law(t: float) -> None:
    problem = line2(0.25)
    base, target, reward = problem.base, problem.member("left"), problem.rewards["left"]
    # Any law will do for the samples: here the base, moved and widened.
    law = GaussianMixture([0.5, 0.5], [[-1.2], [1.0]], [0.3, 0.4])
    a, s = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    column = NODES[:, None]
    log_law, log_ratio = law.log_prob(column), law.log_prob(column) - base.log_prob(column)
    tilt = reward(column) / 0.25 - log_ratio
    score_of = (a * NODES[None] - x[:, None]) / (s * s)
    wanted = target.noised(SCHEDULE, t).score(x[:, None])[:, 0]
    regression = posterior_mean(log_law + tilt, score_of, x, a, s)
    assert float((regression - wanted).abs().max()) < 1e-8
    # Without the log ratio the same regression ends elsewhere.
    assert float((posterior_mean(log_law + reward(column) / 0.25, score_of, x, a, s) - wanted).abs().max()) > 0.05


def without_log_ratio(kl_weight: float, t: float) -> float:
    """Return how far, relatively, S_base + Cov(r / alpha, grad log q) misses the tilt's score at the tilt itself."""
    problem = line2(kl_weight)
    target, reward = problem.member("left"), problem.rewards["left"]
    a, s = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x = target.noised(SCHEDULE, t).sample(400, generator=generator(0))[:, 0]
    column = NODES[:, None]
    log_target, r = target.log_prob(column), reward(column) / kl_weight
    score_of = (a * NODES[None] - x[:, None]) / (s * s)
    mean = posterior_mean(log_target, r, x, a, s)
    covariance = posterior_mean(log_target, (r[None] - mean[:, None]) * score_of, x, a, s)
    wanted = (target.noised(SCHEDULE, t).score(x[:, None]) - problem.base.noised(SCHEDULE, t).score(x[:, None]))[:, 0]
    return float((covariance - wanted).square().sum() / wanted.square().sum()) ** 0.5


def test_without_the_log_ratio_the_fixed_point_is_the_tilt_to_first_order_only() -> None:
    weak, weaker, strong = (without_log_ratio(kl_weight, 0.3) for kl_weight in (20.0, 40.0, 0.25))
    assert 1.8 < weak / weaker < 2.2
    assert weaker < 0.05
    assert strong > 0.25


def test_log_ratio_of_a_path_is_a_likelihood_ratio() -> None:
    # E[p_base / p] = 1 under the tuned process; with half the square of the control, it is not.
    tuned = trainer(steps=20)
    with torch.no_grad():
        for value in tuned.model.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator(1)))
        noise = torch.randn((20, 20_000, 1), generator=generator(2))
        _, log_ratio, kl = follow(tuned.model, tuned.grid, noise, None)
    assert 0.02 < float(kl.mean()) < 1
    for wrong in (0.0, 0.5):
        ratio = (wrong * kl - log_ratio).double().exp()
        away = abs(float(ratio.mean()) - 1) / (float(ratio.std()) / len(ratio) ** 0.5)
        assert away > 5 if wrong else away < 5


def test_weights_are_positive_and_vanish_at_the_optimum() -> None:
    tilt = torch.randn(4, 64, generator=generator(3), dtype=torch.float64)
    weights = excess_weights(tilt)
    assert bool((weights >= 0).all())
    assert bool((weights.min(1).values == 0).all())
    assert not excess_weights(torch.full((2, 8), 3.0)).any()
    assert step_size(tilt * 0.1, 0.5) == 1
    strong = step_size(tilt * 10, 0.5)
    assert 0.01 < strong < 0.3
    shares = 1 / (strong * 10 * tilt).softmax(1).square().sum(1) / 64
    assert abs(float(shares.mean()) - 0.5) < 1e-3


def test_copies_are_antithetic_stratified_and_shared_out() -> None:
    whole, part = trainer(group_size=8, copies=6), trainer(group_size=8, copies=6)
    samples = torch.randn(8, 1, generator=generator(4))
    x, t, eps = whole.copies(samples, slice(0, 8), 6)
    x2, t2, eps2 = part.copies(samples[4:], slice(4, 8), 6)
    assert torch.equal(eps[:24], -eps[24:])
    log_snr = SCHEDULE.log_snr(t).reshape(6, 8)
    assert torch.equal(log_snr[:3], log_snr[3:])
    assert bool(((log_snr[:3] - torch.tensor([[-4.0], [0.0], [4.0]])).abs() <= 2 + 1e-6).all())
    for all_rows, own in ((x, x2), (t, t2), (eps, eps2)):
        # Up to rounding, which depends on how many numbers are computed at once.
        close(own, all_rows.unflatten(0, (6, 8))[:, 4:].flatten(0, 1), 1e-6)


def test_it_ends_at_the_tilt_of_the_stated_kl_weight() -> None:
    problem = gaussian_linear(1.0)
    model = MixtureTunable(problem.base, SCHEDULE, width=32)
    reward = WeightedReward({"right": reward_of(problem.rewards["right"])})
    settings = {"kl_weight": 1.0, "steps": 25, "group_size": 128, "learning_rate": 5e-3}
    tuned = RewardRegression(model, reward, RegressionSettings(**settings))
    gaps = [tuned.iterate()["gap"] for _ in range(50)]
    found = recovered(model, problem.member("right"), count=2000)
    assert abs(found.slope - 1) < 0.12
    assert found.residual < 0.1
    assert sum(gaps[-5:]) / 5 < gaps[0] / 3
    assert abs(recovered(model, problem.member("right", 0.5), count=2000).slope - 1) > 0.12


def test_the_average_of_a_short_run_is_not_where_it_started() -> None:
    tuned = trainer(steps=5, group_size=16, ema_decay=0.999, epochs=1)
    seen, mean = [], tuned.average[0].clone()
    for n in range(1, 9):
        tuned.iterate()
        seen.append(tuned.parameters[0].detach().clone())
        mean = mean.lerp(seen[-1], 1 - (1 + n) / (10 + n))
    close(tuned.average[0], mean, 1e-6)
    start = trainer(steps=5, group_size=16).parameters[0].detach()
    assert float((mean - start).norm()) > 0.5 * float((seen[-1] - start).norm())


def test_two_runs_are_one() -> None:
    runs = [trainer(steps=5, group_size=16) for _ in range(2)]
    logs = [[run.iterate() for _ in range(3)] for run in runs]
    assert logs[0] == logs[1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters, runs[1].parameters, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"copies": 3}, "copies"), ({"epochs": 0}, "epochs"), ({"effective": 1.0}, "effective"),
     ({"low": 6.0}, "below high"), ({"low": 20.0, "high": 30.0}, "overlap"),
     ({"spacing": "even"}, "spacing")],
)  # fmt: skip
def test_settings_refuse(change: dict[str, object], words: str) -> None:
    refuses(lambda: trainer(**change), words)


def test_a_reward_that_is_not_finite_stops_the_run() -> None:
    tuned = trainer(steps=4, group_size=8)
    tuned.reward = WeightedReward({"bad": lambda samples, condition: QuadraticReward([1.0])(samples) / 0})
    refuses(tuned.iterate, "finite")
