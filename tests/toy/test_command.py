"""The command ``sdeblend toy``: what it writes, and that what it cannot use is one sentence and no file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import toy.plotting
from sdeblend.shell import cli
from toy.experiment.problem_file import load_problem
from toy.problems import ring8

EXAMPLES = Path(toy.__file__).parent / "examples"
SMALL = (EXAMPLES / "line2.toml").read_text().replace("steps = 200", "steps = 8").replace("= 20000", "= 60")
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def problem(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the small problem with replacements."""

    def write(*changes: tuple[str, str], source: str = SMALL) -> Path:
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / "problem.toml"
        path.write_text(source)
        return path

    return write


def strict(text: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("suffix", MAGIC)
def test_writes_numbers_and_figure(
    problem: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    out, figure = tmp_path / "new" / "out.json", tmp_path / f"out{suffix}"
    assert cli.main(["toy", str(problem()), "--json", str(out), "--figure", str(figure)]) == 0
    report = strict(out.read_text())
    assert set(report) == {"target", "methods"}
    assert set(report["methods"]) == {"exact", "mpa", "mpa-corrected", "ls", "ls-iid"}
    assert all(map(math.isfinite, numbers(report)))
    assert figure.read_bytes().startswith(MAGIC[suffix])
    captured = capsys.readouterr()
    assert captured.err == ""
    for line in ("exact target, log Z = -1.7847", "mpa-corrected", "component weights", "mean reward"):
        assert line in captured.out
    assert max(map(len, captured.out.splitlines())) <= 120


def test_without_outputs_it_only_prints(problem: Callable[..., Path], tmp_path: Path) -> None:
    path = problem()
    assert cli.main(["toy", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    lines = [line for line in example.read_text().splitlines() if not line.startswith(("steps", "samples"))]
    path = tmp_path / example.name
    path.write_text("\n".join([*lines, "steps = 4", "samples = 40"]))
    assert cli.main(["toy", str(path), "--figure", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").stat().st_size > 20_000


def test_ring_file_is_the_named_problem() -> None:
    read, settings = load_problem(EXAMPLES / "ring8.toml")
    named = ring8()
    torch.testing.assert_close(read.base.means, named.base.means, rtol=0, atol=1e-13)
    assert torch.equal(read.base.weights, named.base.weights)
    assert torch.equal(read.base.covariances, named.base.covariances)
    for name, reward in named.rewards.items():
        torch.testing.assert_close(read.rewards[name].linear, reward.linear, rtol=1e-14, atol=0)
    assert (read.kl_weight, settings.steps, settings.samples, settings.seed) == (0.25, 200, 20_000, 0)
    assert (settings.schedule, settings.solver, settings.strength) == ("vp-linear", "euler-maruyama", 1.0)
    assert settings.methods is None


def test_file_says_what_runs(problem: Callable[..., Path]) -> None:
    read, settings = load_problem(
        problem(
            ("covariances = [[[0.16]], [[0.25]]]", "variances = [1, 2.5]"),
            ("linear = [-1.0]", "linear = [-2]\nconstant = 3"),
            ("strength = 1.0", 'strength = 0.5\nspacing = "karras"'),
            ("seed = 0", "seed = 7"),
        )
    )
    assert read.name == "problem"
    assert read.base.covariances.flatten().tolist() == [1.0, 2.5]
    left = read.rewards["left"]
    assert (left.linear.tolist(), left.quadratic.tolist(), left.constant) == ([-2.0], [[1.0]], 3.0)
    assert (settings.strength, settings.spacing, settings.seed) == (0.5, "karras", 7)


BAD = {
    "unknown key": (("steps = 8", "stepps = 8"), "[blend] unknown key 'stepps'; allowed keys: kl_weight, methods, "),
    "unknown table": (("[blend]", "[bland]"), "unknown key 'bland'; allowed keys: base, blend, rewards"),
    "wrong type": (("steps = 8", 'steps = "8"'), "[blend] steps must be an integer from 2 to 10000, got '8'"),
    "missing key": (("kl_weight = 0.25", ""), "[blend] kl_weight is missing; give a finite number above 0"),
    "KL weight 0": (("kl_weight = 0.25", "kl_weight = 0"), "[blend] kl_weight must be a finite number above 0, got 0"),
    "KL weight < 0": (("kl_weight = 0.25", "kl_weight = -1"), "kl_weight must be a finite number above 0, got -1"),
    "KL weight tiny": (("kl_weight = 0.25", "kl_weight = 1e-300"), "must fit into float64, got some that do not"),
    "no such member": (
        ("quadratic = [[1.0]]", "quadratic = [[-1.2]]"),
        "[blend]: the member tuned for 'left': the tilt exists only if covariance^-1 + quadratic/kl_weight is positive "
        "definite, got smallest eigenvalue -0.8 for component 1",
    ),
    "no such target": (("strength = 1.0", "strength = -9.0"), "smallest eigenvalue -11.75 for component 0"),
    "covariance": (("[[0.25]]", "[[-0.25]]"), "[base] covariances must be positive definite, got smallest"),
    "no covariance": (("covariances", "# covariances"), "[base] needs either covariances or variances, got neither"),
    "components": (("means = [[-1.5], [1.5]]", "means = [[-1.5]]"), "[base] a mixture needs weights (K,) and means"),
    "ragged": (("means = [[-1.5], [1.5]]", "means = [[-1.5], [1.5, 2]]"), "means must be numbers in rows of equal"),
    "weights of the base": (("[0.6, 0.4]", "[0.6, 0.5]"), "[base] mixture weights must sum to 1, got 1.1"),
    "reward dimension": (
        ("linear = [1.0]", "linear = [1.0, 2.0]"),
        "[[rewards]] 1: the base has dimension 1, got a reward in 2",
    ),
    "empty reward": (("linear = [1.0]", ""), "[[rewards]] 1 a reward needs linear (d,), quadratic (d, d) or both"),
    "reward twice": (('name = "left"', 'name = "right"'), "[[rewards]] 2: name must be neither empty nor taken"),
    "key of a reward": (("quadratic =", "quadratics ="), "[[rewards]] 2 unknown key 'quadratics'; allowed keys: "),
    "method": (('"ls-iid"', '"lora"'), "[blend] methods must be a list of any of 'exact', 'mpa', "),
    "schedule": (('"vp-linear"', '"vp"'), "[blend] schedule must be one of 'vp-linear', 'vp-cosine', "),
    "solver": (('"euler-maruyama"', '"euler"'), "[blend] solver must be one of 'euler-maruyama', "),
    "spacing": (("seed = 0", 'spacing = "log"'), "[blend] spacing must be one of 'uniform', 'log-snr', "),
    "correction of an ODE": (
        ('"euler-maruyama"', '"dpm-2m"'),
        "method 'mpa-corrected' does not apply with solver 'dpm-2m' and coefficients [0, 0.5, 0.5]: a correction "
        "needs a solver with noise; leave it out",
    ),
    "one member of negative weight": (
        ("strength = 1.0", "strength = 1.5"),
        "method 'ls' does not apply with solver 'euler-maruyama' and coefficients [-0.5, 0.75, 0.75]: one member a "
        "step needs coefficients that are probabilities",
    ),
    "too few weights": (("[0.5, 0.5]", "[1.0]"), "[blend]: weights in order must be one a member (right, left), got 1"),
    "NaN weight": (
        ("[0.5, 0.5]", "[nan, 0.5]"),
        "[blend] weights must be a list of finite numbers or a table of finite numbers, got [nan",
    ),
    "one step": (("steps = 8", "steps = 1"), "[blend] steps must be an integer from 2 to 10000, got 1"),
    "no samples": (("samples = 60", "samples = 0"), "[blend] samples must be an integer from 10 to "),
    "seed": (("seed = 0", "seed = -1"), "[blend] seed must be an integer from 0"),
    "broken TOML": (("kl_weight = 0.25", "kl_weight = "), "not valid TOML: Invalid value (at line 18, column 13)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_no_file(
    problem: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    message: str,
) -> None:
    path = problem(change)
    out = ["--json", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    assert cli.main(["toy", str(path), *out]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"sdeblend toy: {path}: ")
    assert message in captured.err
    assert list(tmp_path.iterdir()) == [path]


def test_no_reward_at_all(problem: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    head, _, tail = SMALL.partition("[[rewards]]")
    path = problem(source="rewards = []\n" + head + tail[tail.index("[blend]") :])
    assert cli.main(["toy", str(path)]) == 2
    message = "a problem needs at least one reward, got none; add a table [[rewards]]"
    assert capsys.readouterr().err == f"sdeblend toy: {path}: {message}\n"


def test_a_state_that_is_not_finite_stops_the_run(
    problem: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The closed forms hold in float64; the state is float32.
    path = problem(("[[-1.5], [1.5]]", "[[-1e38], [1e38]]"))
    assert cli.main(["toy", str(path), "--json", str(tmp_path / "out.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "got a non-finite value in sample 0 at step 1 (t = 1 ->" in captured.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figure", "{}/out.gif"], "out.gif: a figure's name must end in one of .png, .svg, .pdf, got 'out.gif'"),
        (["--json", "{}/problem.toml"], "problem.toml: every file needs a name of its own"),
        (["--json", "{}/out.png", "--figure", "{}/out.png"], "out.png: every file needs a name of its own"),
        (["--json", "{}"], "is a folder; name a file to write"),
        (["--json", "{}/problem.toml/out.json"], "problem.toml is no folder; choose another place"),
    ],
)
def test_outputs_are_checked_before_the_run(
    problem: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    def run(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the run was started")

    monkeypatch.setattr("toy.command.run", run)
    path = problem()
    assert cli.main(["toy", str(path), *[option.format(tmp_path) for option in options]]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == SMALL


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_problem_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["toy", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith(f"sdeblend toy: {tmp_path / name}: ")


def test_a_failure_leaves_what_was_there(
    problem: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*_: Any) -> NoReturn:
        raise OSError("no figure today")

    monkeypatch.setattr(toy.plotting, "encoded", encoded)
    out = tmp_path / "out.json"
    out.write_text("from before")
    path = problem()
    assert cli.main(["toy", str(path), "--json", str(out), "--figure", str(tmp_path / "out.png")]) == 2
    assert out.read_text() == "from before"
    assert sorted(tmp_path.iterdir()) == [out, path]


def test_keys_are_those_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", "--keys"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ("[base]", "covariances", "[[rewards]]", "quadratic", "[blend]", "kl_weight", "'heun'", "20000"):
        assert text in shown


def test_help_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", "--help"])
    assert stop.value.code == 0
    assert "PROBLEM.toml" in capsys.readouterr().out
    cli.main(["--help"])
    assert "Blend rewards on a Gaussian mixture" in capsys.readouterr().out
