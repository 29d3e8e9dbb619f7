"""The small network on mixtures: pre-training, low-rank differences, files, and the exact eps beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from sdeblend import VPLinear
from sdeblend.shell.settings import parse, read_toml
from tests.support.strategies import close, generator, mixtures, refuses
from toy.mixtures.mixture import GaussianMixture
from toy.networks.network import for_mixture, load_network, pretrain, save_network
from toy.networks.tunable import ExactEps, MixtureSettings, MixtureTunable, TunedScore
from toy.problems import line2, ring8
from toy.statements.recovery import recovered

SCHEDULE = VPLinear()
TABLE = {"problem": "line2", "base": "exact", "width": 16}


def small(steps: int = 0) -> MixtureTunable:
    problem = line2()
    network = for_mixture(problem.base, SCHEDULE, seed=0, width=64)
    if steps:
        pretrain(network, problem.base, steps=steps, batch=256)
    return MixtureTunable(problem.base, SCHEDULE, network, rank=2)


@given(mixture=mixtures())
def test_exact_eps_is_the_score_of_every_row(mixture: GaussianMixture) -> None:
    times = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    x = torch.randn(4, mixture.dim, generator=generator(0), dtype=torch.float64)
    eps = ExactEps(mixture, SCHEDULE)(x, times)
    for row, t in enumerate(times):
        close(eps[row], -SCHEDULE.sigma(t) * mixture.noised(SCHEDULE, t).score(x[row]), 1e-9)


def test_pre_training_learns_the_score() -> None:
    problem = line2()
    target = problem.member("right", 1.0)
    errors = [recovered(small(steps), target, count=4000).base_residual for steps in (0, 400)]
    assert errors[1] < 0.15 < errors[0]


def test_only_differences_are_trained_and_they_start_at_nothing() -> None:
    model = small()
    x, t = torch.randn(5, 1, generator=generator(1)), torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(model.tuned(x, t), model.base(x, t))
    model.tuned(x, t).square().sum().backward()
    assert all(value.grad is not None for value in model.trainable().values())
    assert {name for name, value in model.network.named_parameters() if value.requires_grad} == set(model.trainable())
    assert any(bool(value.grad.any()) for value in model.trainable().values())
    model.base(x, t).square().sum()
    with torch.no_grad():
        before = model.base(x, t)
        for value in model.trainable().values():
            value.add_(0.1)
        assert torch.equal(model.base(x, t), before)
        assert not torch.equal(model.tuned(x, t), before)


@pytest.mark.parametrize("exact", [True, False])
def test_member_file_round_trip(tmp_path: Path, exact: bool) -> None:
    def make() -> MixtureTunable:
        return MixtureTunable(line2().base, SCHEDULE, width=16) if exact else small()

    model, other = make(), make()
    with torch.no_grad():
        for value in model.trainable().values():
            value.normal_(generator=generator(2))
    path = model.save(tmp_path / "member", {"sdeblend.kl_weight": "0.5"})
    assert other.load(path) == {"sdeblend.kl_weight": "0.5"}
    x, t = torch.randn(5, 1, generator=generator(3)), torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(model.tuned(x, t), other.tuned(x, t))
    stranger = MixtureTunable(ring8().base, SCHEDULE, width=16)
    refuses(lambda: stranger.load(path), "trainable part")


def test_identity_tells_bases_apart_and_not_members() -> None:
    model = small()
    name = model.identity()
    with torch.no_grad():
        for value in model.trainable().values():
            value.add_(1.0)
    assert model.identity() == name
    assert small(1).identity() != name
    assert MixtureTunable(line2().base, SCHEDULE, width=16).identity() != name


def test_network_files(tmp_path: Path) -> None:
    network = for_mixture(line2().base, SCHEDULE, seed=0, width=16)
    other = for_mixture(line2().base, SCHEDULE, seed=1, width=16)
    save_network(network, tmp_path / "n.safetensors")
    load_network(other, tmp_path / "n.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    narrow = for_mixture(line2().base, SCHEDULE, seed=0, width=8)
    refuses(lambda: load_network(narrow, tmp_path / "n.safetensors"), "this network")
    (tmp_path / "bad").write_text("no")
    refuses(lambda: load_network(network, tmp_path / "bad"), "this network")


def test_tuned_score_is_a_score() -> None:
    model, t = MixtureTunable(line2().base, SCHEDULE, width=16), torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(7, 1, generator=generator(4), dtype=torch.float64)
    close(TunedScore(model)(x, t), model.mixture.noised(SCHEDULE, t).score(x), 1e-5)


def built(table: dict[str, object], reward: str, folder: Path, seed: int = 0) -> tuple[Any, Any]:
    file = folder / "c.toml"
    options = parse(MixtureSettings, table, file=file, section="[model]")
    return options.build((reward,), file=file, seed=seed, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"problem": "ring9"}, "problem"), ({"rank": 0}, "rank"), ({"depth": 3}, "depth"), ({"base": "net"}, "base")],
)
def test_build_refuses(change: dict[str, object], words: str, tmp_path: Path) -> None:
    def call() -> object:
        return built(TABLE | change, "right", tmp_path)

    refuses(call, words)


def test_build_makes_the_model_and_its_rewards(tmp_path: Path) -> None:
    place = tmp_path / "n.safetensors"
    (tmp_path / "c.toml").write_text(
        f'problem = "line2"\nwidth = 16\npretrain_steps = 2\nnetwork = "{place.as_posix()}"\n'
    )
    table = read_toml(tmp_path / "c.toml")
    models = [built(table, "left", tmp_path, seed=s) for s in (0, 1)]
    assert place.exists()
    assert models[0][0].identity() == models[1][0].identity()
    x = torch.randn(5, 1, generator=generator(5))
    close(models[0][1]["left"](x, None), line2().rewards["left"](x))
    refuses(lambda: built(table, "up", tmp_path), "right, left")
