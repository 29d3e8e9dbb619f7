"""Policy gradients: ratios and KL, the exact gradient and optimum on a line, and DPOK as it was published."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdeblend import VPLinear
from sdeblend.finetune.paths import draw_noise
from sdeblend.finetune.trainers.ddpo import DDPO, DDPOSettings
from sdeblend.finetune.trainers.dpok import DPOK, DPOKSettings
from sdeblend.finetune.trainers.policy import Steps, StepWeights, clipped
from sdeblend.finetune.trainers.replay import Replayed
from sdeblend.finetune.trainers.value import Value, hashed
from sdeblend.grid import time_grid
from sdeblend.reward import WeightedReward
from sdeblend.schedule import TrainedTable
from sdeblend.shell.processes import Processes
from tests.support.finetune_models import Chain, Line, best, gradient_of, quadratic
from tests.support.strategies import close, generator, refuses

DRAWS = torch.float64


def chain_of(model: Line, steps: int = 12) -> Chain:
    return Chain(model, time_grid(model.schedule, steps, "log-snr"))


@pytest.mark.parametrize("dim", [1, 5])
def test_log_prob_and_ratio_are_those_of_normals(dim: int) -> None:
    model, g = Line(dim=dim), generator(0)
    chain = chain_of(model)
    weights, k = StepWeights.of(model, chain.grid, "chain"), torch.arange(11)
    x, old, new, z = (torch.randn(len(k), dim, generator=g, dtype=DRAWS) for _ in range(4))
    following = chain.mean(x, old, k) + chain.g[k, None] * z

    def normal(prediction: torch.Tensor) -> torch.Tensor:
        law = torch.distributions.Normal(chain.mean(x, prediction, k), chain.g[k, None])
        return law.log_prob(following).sum(1)

    close(weights.log_ratio(new - old, z, k), normal(new) - normal(old), 1e-8)
    laws = [torch.distributions.Normal(chain.mean(x, p, k), chain.g[k, None]) for p in (new, old)]
    close(weights.kl(new - old, k), torch.distributions.kl_divergence(*laws).sum(1))


def test_ratio_keeps_its_digits_on_large_images() -> None:
    model = Line(dim=65536)
    chain, g = chain_of(model), generator(1)
    weights, k = StepWeights.of(model, chain.grid, "chain"), torch.tensor([5])
    x, old, z = (torch.randn(1, 65536, generator=g) for _ in range(3))
    new = old + 1e-5 * torch.randn(1, 65536, generator=g)
    exact = weights.log_ratio((new - old).double(), z.double(), k)
    close(weights.log_ratio(new - old, z, k).double(), exact, 1e-4)
    following = chain.mean(x, old, k) + float(chain.g[5]) * z
    naive = torch.zeros(())
    for sign, prediction in ((1, new), (-1, old)):
        distance = (following - chain.mean(x, prediction, k)).square().flatten(1).sum(1)
        naive = naive - sign * distance / (2 * chain.g[k].to(distance).square())
    assert float((naive - exact).abs()) > 0.01 * float(exact.abs())


@pytest.mark.parametrize("share", [1.0, pytest.param(0.9, marks=pytest.mark.xfail(strict=True))])
@pytest.mark.parametrize("kl", ["chain", "process"])
def test_sampled_costs_have_the_mean_of_the_exact_kl(kl: Any, share: float) -> None:
    model = Line(0.3, 1.0, 3)
    with torch.no_grad():
        model.shift.fill_(1.0), model.slope.fill_(0.3)
    trainer = DDPO(model, quadratic(), DDPOSettings(group_size=20_000, steps=8, kl=kl))
    paths = trainer.draw_paths()
    sampled = paths.cost.sum(1).double()
    error = sampled.mean() - share * paths.kl.double().mean()
    assert abs(float(error)) < 4 * float((sampled - paths.kl).std() / len(sampled) ** 0.5)


def sampled_gradients(trainer: Any, count: int) -> torch.Tensor:
    """Return the gradient that each of ``count`` iterations would take, (count, 2), parameters held."""
    model, out = trainer.model, []
    start = [p.detach().clone() for p in trainer.parameters]
    for _ in range(count):
        trainer.iterate()
        out.append(-torch.stack([model.shift.grad.sum(), model.slope.grad.sum()]).double())
        with torch.no_grad():
            for p, value in zip(trainer.parameters, start, strict=True):
                p.copy_(value)
    return torch.stack(out)


@pytest.mark.parametrize("kl", ["chain", "process"])
def test_gradient_is_that_of_reward_less_kl(kl: Any) -> None:
    model = Line(0.3)
    theta = torch.tensor([0.8, -0.5])
    with torch.no_grad():
        model.shift.copy_(theta[:1]), model.slope.copy_(theta[1:])
    settings = DDPOSettings(
        kl_weight=1.0, group_size=1024, steps=10, updates=1, learning_rate=1e-12, clip_norm=float("inf"), kl=kl
    )
    trainer = DDPO(model, quadratic(1.0, 0.5), settings)
    drawn = sampled_gradients(trainer, 60)
    mean, error = drawn.mean(0), drawn.std(0) / len(drawn) ** 0.5
    exact = gradient_of(model, Chain(model, trainer.grid), kl, theta, 1.0, 1.0, 0.5)
    assert bool(((mean - exact).abs() < 4 * error).all()), (mean, exact, error)
    dropped = gradient_of(model, Chain(model, trainer.grid), kl, theta, 1.0, 1.0, 0.5, dropped=True)
    assert bool(((mean - dropped).abs() > 8 * error).any()), (mean, dropped, error)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDPO, DDPOSettings(group_size=256, steps=10, learning_rate=0.05, ema_decay=0.98, updates=2)),
        (DPOK, DPOKSettings(group_size=256, steps=10, learning_rate=0.03, ema_decay=0.99, updates=4, batch=1024,
                            value_updates=4, value_batch=512, buffer=5120)),
    ],
)  # fmt: skip
def test_training_ends_at_the_best_policy(kind: Any, settings: Any) -> None:
    model, kl_weight = Line(0.3), 0.5
    trainer = kind(model, quadratic(1.0, 0.5), settings.changed(kl_weight=kl_weight))
    for _ in range(100):
        trainer.iterate()
    # In the order of their names: shift, slope.
    found = torch.stack(trainer.average)[:, 0].double()
    right = best(model, Chain(model, trainer.grid), "process", kl_weight, 1.0, 0.5)
    wrong = best(model, Chain(model, trainer.grid), "process", kl_weight, 1.0, 0.5, dropped=True)
    distance = float((found - right).norm())
    print(kind.__name__, found.tolist(), right.tolist(), wrong.tolist(), distance / float(right.norm()))
    assert distance < 0.05 * float(right.norm())
    assert distance < 0.5 * float((found - wrong).norm())


def test_process_kl_makes_kl_weight_the_alpha_of_the_tilt() -> None:
    # N(0, 1) tilted by x / alpha is N(1 / alpha, 1): a shift of 1 at kl_weight 1.
    for steps, near, far in ((25, 0.08, 0.25), (50, 0.04, 0.15)):
        chain = chain_of(Line(), steps)
        assert abs(float(best(Line(), chain, "process", 1.0, 1.0, 0.0)[0]) - 1) < near
        assert float(best(Line(), chain, "chain", 1.0, 1.0, 0.0)[0]) < 1 - far


def test_advantages_leave_the_sample_out_and_compare_within_prompts() -> None:
    model = Line(prompts=("low", "high"))
    trainer = DDPO(model, quadratic(1.0, low=0.0, high=100.0), DDPOSettings(groups=8, group_size=4, steps=5))
    paths = trainer.draw_paths()
    returns = trainer.returns(paths)
    # The base's own paths cost nothing, so every step has the path's reward.
    r = paths.rewards.reshape(8, 4)
    expected = r - (r.sum(1, keepdim=True) - r) / 3
    close(returns, expected.flatten()[:, None].expand(-1, 5), 1e-4)
    assert float(returns.abs().max()) < 10


def test_clipped_is_ppo() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    value = clipped(ratio, advantage, 0.2)
    close(value.detach(), torch.tensor([0.5, -0.8, 1.2, -1.5, 2.2]))
    (slope,) = torch.autograd.grad(value.sum(), ratio)
    close(slope, torch.tensor([1.0, 0.0, 0.0, -1.0, 2.0]))


def published(**changes: Any) -> DPOK:
    return DPOK(Line(0.3, 1.0, 4), quadratic(1.0), DPOKSettings(mode="published", **changes))


def test_published_settings() -> None:
    s = DPOKSettings(mode="published")
    assert (s.steps, s.learning_rate, s.clip_norm, s.groups * s.group_size) == (50, 1e-5, 0.1, 6)
    assert (s.buffer, s.updates, s.batch, s.value_updates, s.value_batch, s.value_rate) == (1000, 5, 24, 5, 256, 1e-4)
    assert (s.reward_weight, s.kl_weight, s.clip) == (1000, 0.1, 1e-4)
    trainer = published()
    trainer.iterate()
    assert trainer.reward_calls == 6 and not trainer.calibrated


@pytest.mark.parametrize(("schedule", "low", "high"), [
    (VPLinear(), 3.33e-6, 8.95e-4), (TrainedTable.stable_diffusion(), 9.17e-6, 1.40e-3),
])  # fmt: skip
def test_published_kl_weight_depends_on_the_step(schedule: Any, low: float, high: float) -> None:
    model = Line()
    model.schedule = schedule
    weights = DPOK(model, quadratic(), DPOKSettings(mode="published")).kl_weights()
    assert float(weights.min()) == pytest.approx(low, rel=0.01)
    assert float(weights.max()) == pytest.approx(high, rel=0.01)


def test_published_loss_is_the_authors() -> None:
    trainer = published(groups=3, steps=6)
    with torch.no_grad():
        trainer.model.shift.fill_(0.5)
    state = trainer.generator.get_state()
    paths = trainer.draw_paths()
    trainer.replay.add(paths, paths.rewards[:, None].expand(-1, 5), state)
    trainer.value.offset, trainer.value.scale = torch.tensor(0.4).double(), torch.tensor(1.0).double()
    with torch.no_grad():
        # A policy a little further, so that some ratios leave the clip.
        trainer.model.shift += 2e-3
    mine = torch.tensor([[0, i, k] for i in range(3) for k in range(5)])
    loss = trainer._loss(mine)(torch.arange(15))
    assert loss.requires_grad
    i, k = mine[:, 1], mine[:, 2]
    x, t = paths.steps.states[i, k], trainer.grid[k]
    out, old = trainer.model.tuned(x, t, None), paths.steps.predictions[i, k]
    chain = Chain(trainer.model, trainer.grid)
    following = chain.mean(x, old, k) + chain.g[k, None].float() * paths.steps.noise[i, k]

    def mean_log_prob(prediction: torch.Tensor) -> torch.Tensor:
        law = torch.distributions.Normal(chain.mean(x, prediction, k).double(), chain.g[k, None])
        return law.log_prob(following.double()).mean(1)

    ratio = (mean_log_prob(out) - mean_log_prob(old)).exp()
    eps = (out - trainer.model.base(x, t, None)).square().mean(1)
    expected = 0.1 * eps - 1000 * (paths.rewards[i] - 0.4) * ratio.clamp(1 - 1e-4, 1 + 1e-4)
    close(loss.detach().double(), expected.detach().double(), 1e-6)
    outside = (ratio - 1).abs() > 1e-4
    assert 0 < int(outside.sum()) < 15 and int(trainer.held) == int(outside.sum())
    # Held ratios have no gradient but that of the difference in eps, which is bounded.
    (slope,) = torch.autograd.grad(loss[outside].sum(), trainer.model.shift, retain_graph=True)
    (pull,) = torch.autograd.grad(0.1 * eps[outside].sum(), trainer.model.shift)
    close(slope, pull, 1e-4)


def test_replay_keeps_the_last_steps_only() -> None:
    model = Line(prompts=("a", "b"))
    trainer = DPOK(model, quadratic(), DPOKSettings(groups=2, group_size=3, steps=5, buffer=70, batch=8, value_batch=8))
    for _ in range(5):
        trainer.iterate()
    # 30 steps an iteration: the last 70 lie in 3 blocks, of whose first 20 are too old.
    drawn = trainer.replay.draw(4000, 6, generator(0))
    assert len(trainer.replay.blocks) == 3
    assert int(drawn.min()) == 20 and int(drawn.max()) == 89
    steps = trainer.replay.take(trainer.replay.own(drawn, 6))
    assert steps.prompts is not None and len(steps.prompts) == 4000 == len(steps.k)
    for part, condition, rows in steps.pieces:
        assert condition is not None and list(steps.prompts[part]) == [condition.prompts[i] for i in rows.tolist()]


def test_value_learns_states_times_and_prompts() -> None:
    value, g = Value(2, 1e-2, 0, torch.device("cpu")), generator(2)
    x, t = torch.randn(512, 2, generator=g), torch.rand(512, generator=g)
    prompts = tuple("a red circle" if i % 2 else "a blue square" for i in range(512))
    returns = 50 + x[:, 0] * t + torch.tensor([2.0 if i % 2 else 0.0 for i in range(512)])

    drawn = Replayed(Steps(x, x, x, x), returns, torch.zeros(512, dtype=torch.long), prompts, [])
    losses = [value.fit(drawn, t, 512, Processes()) for _ in range(200)]
    assert losses[0] == pytest.approx(1, abs=0.01) and losses[-1] < 0.03
    close(value(x, t, prompts).float(), returns, 0.03)


def test_hashed_words_have_no_order_and_differ() -> None:
    assert hashed("a red circle") == hashed("circle a Red") != hashed("a blue circle")
    assert len(hashed("")) == len(hashed("one two"))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: DDPOSettings(kl_weight=0), ("kl_weight", "above 0", "0")),
        (lambda: DDPOSettings(kl_weight=-1.0), ("kl_weight", "-1")),
        (lambda: DDPOSettings(group_size=1), ("group_size", "at least 2", "1")),
        (lambda: DDPOSettings(clip=1.0), ("clip", "(0, 1)")),
        (lambda: DDPOSettings(updates=0), ("updates", "at least 1")),
        (lambda: DPOKSettings(mode="x"), ("mode", "exact", "published", "'x'")),
        (lambda: DPOKSettings(reward_weight=2.0), ("reward_weight", "must be 1", "kl_weight")),
        (lambda: DPOKSettings(buffer=0), ("buffer", "at least 1")),
        (lambda: DPOKSettings(value_rate=0.0), ("value_rate", "above 0")),
        (lambda: DPOKSettings(group_size=0), ("group_size", "at least 1")),
    ],
)
def test_refuses_settings(make: Any, parts: tuple[str, ...]) -> None:
    refuses(make, *parts)


@pytest.mark.parametrize("kind", ["ddpo", "dpok"])
@pytest.mark.parametrize(
    ("value", "parts"), [(lambda x, c: x, ("shape (8,)", "(8, 1)")), (lambda x, c: x[:, 0] * torch.nan, ("finite",))]
)
def test_refuses_rewards(kind: str, value: Any, parts: tuple[str, ...]) -> None:
    reward = WeightedReward({"mine": value})
    settings = {"group_size": 8, "steps": 3}
    trainer: Any = DDPO(Line(), reward, DDPOSettings(**settings))
    if kind == "dpok":
        trainer = DPOK(Line(), reward, DPOKSettings(**settings))
    refuses(trainer.iterate, "'mine'", *parts)


@pytest.mark.rng_untouched
def test_micro_batches_and_the_global_generator_change_nothing() -> None:
    ends = []
    for size in (1000, 7):
        trainer = DDPO(Line(), quadratic(), DDPOSettings(group_size=16, steps=5, micro_batch=size))
        for _ in range(3):
            trainer.iterate()
        ends.append(torch.cat([p.detach() for p in trainer.parameters]))
    close(ends[0], ends[1], 1e-5)
    g = generator(0)
    close(draw_noise(Line(), 5, slice(2, 4), 6, g), draw_noise(Line(), 5, slice(0, 6), 6, generator(0))[:, 2:4])
