"""Mixtures of one's own in ``sdeblend evaluate``: the tables of a problem file, run to the end, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from sdeblend.methods.draws import Draws
from sdeblend.methods.registry import METHODS
from sdeblend.shell import cli
from sdeblend.shell.settings import read_toml
from tests.support.strategies import refuses
from toy.evaluate.backend import build
from toy.experiment import load_problem, run

EXAMPLE = Path(toy.__file__).parent / "examples" / "line2.toml"
HEAD = '[backend]\nkind = "mixture"\nsolver = "euler-maruyama"\nspacing = "uniform"\nsteps = 8\n'
GRID = '[grid]\nmethods = ["mpa", "exact"]\nseeds = 60\nblock = 60\n[report]\nresamples = 100\n'


def own(name: str = "mine", **changes: str) -> str:
    """Return the tables of the example's problem under a name of the backend."""
    tables = EXAMPLE.read_text().partition("[blend]")[0].partition("[base]")[2]
    text = f"[backend.mixtures.{name}]\nkl_weight = 0.25\n[backend.mixtures.{name}.base]" + tables.replace(
        "[[rewards]]", f"[[backend.mixtures.{name}.rewards]]"
    )
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_a_mixture_of_ones_own_is_evaluated_beside_named_ones(tmp_path: Path) -> None:
    config, out = tmp_path / "c.toml", tmp_path / "out"
    config.write_text(HEAD + 'problems = ["conflict_line"]\n' + own() + GRID)
    assert cli.main(["evaluate", str(config), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert "mine" in json.dumps(summary) and "conflict_line" in json.dumps(summary)
    assert "mine" in (out / "tables.md").read_text()


def test_it_is_the_problem_of_the_file_and_sampled_as_by_the_toy_command(tmp_path: Path) -> None:
    problem, settings = load_problem(EXAMPLE)
    (tmp_path / "c.toml").write_text(HEAD + own())
    table = read_toml(tmp_path / "c.toml")["backend"]
    table.pop("kind")
    case = build(table, file="c.toml", seed=0, device=torch.device("cpu")).case("mine", "")
    assert torch.equal(case.problem.base.covariances, problem.base.covariances)
    assert case.problem.names == problem.names and case.problem.kl_weight == problem.kl_weight
    experiment = run(problem, settings.changed(steps=8, samples=60, methods=["mpa", "ls"]))
    assert torch.equal(case.grid, experiment.case.grid)
    for short, name in (("mpa", "mpa"), ("ls", "ls-systematic")):
        drawn = METHODS[name](case, experiment.preference, Draws(0, "", range(60)))
        assert torch.equal(drawn.samples, experiment.samples[short].samples)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[0.25]]", "[[-0.25]]", "[backend.mixtures.mine.base] covariances must be positive definite"),
        ('name = "left"', 'name = "right"', "[backend.mixtures.mine] [[rewards]] 2: name must be neither empty nor"),
        ("quadratic =", "quadratics =", "[[backend.mixtures.mine.rewards]] 2 unknown key 'quadratics'; allowed keys: "),
        ("kl_weight = 0.25", "kl_weight = 0", "[backend.mixtures.mine] kl_weight must be a finite number above 0"),
        ("quadratic = [[1.0]]", "quadratic = [[-1.2]]", "[backend] mine: the tilt exists only if"),
        ("mine", "ring8", "[backend] must name no problem, KL weight, reward count, draw or training twice, got"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    text = HEAD + 'problems = ["ring8"]\n' + own() + GRID
    assert old in text
    config.write_text(text.replace(old, new))
    assert cli.main(["evaluate", str(config), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"sdeblend evaluate: {config}: ") and message in err
    assert not (tmp_path / "out").exists()


def test_a_backend_without_a_problem_is_refused() -> None:
    refuses(lambda: build({}, file="f", seed=0, device=torch.device("cpu")), "f: [backend] needs at least one problem")
