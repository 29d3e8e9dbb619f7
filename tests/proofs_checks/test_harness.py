"""The harness: a file is a statement, what it says fits a terminal, and many seeds can be stopped and go on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

import proofs_checks
from proofs_checks.harness import command, runner, seeds, terminal
from proofs_checks.harness.check import Measurement, Outcome, Settings, slope
from proofs_checks.harness.statements import statements

MINE = '''
from proofs_checks.harness.check import Measurement, Outcome
PLACE, TITLE, WORDS, FORMULA, FALSIFIED_BY = 5, "Arithmetic", "Sums are sums.", "1 + 1 = 2", "another sum"
def check(settings):
    off = 1.0 if settings.seed == 7 else 0.0
    sums = Measurement("one and one less two", off, "<=", 0.5, "one and two", 1.0)
    products = Measurement("twice two less four", 0.0, "<=", 0.5, "thrice two", 2.0)
    return Outcome([sums, products], findings=["a finding " * 30])
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A statement that is added by one file."""
    (tmp_path / "arithmetic.py").write_text(MINE)
    monkeypatch.setattr(proofs_checks, "__path__", [*proofs_checks.__path__, str(tmp_path)])
    statements.cache_clear()
    yield "arithmetic"
    statements.cache_clear()


def test_a_file_in_the_folder_is_a_statement(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(statements()) == ["arithmetic", *list(statements())[1:]]  # its place is the first
    assert command.main(["--only", mine, "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "Arithmetic" in said and "1 of 1 statements hold" in said
    assert "repeat with sdeblend verify --seed 1 --only arithmetic\n" in said


def test_statements_have_places_of_their_own_and_all_that_a_report_needs() -> None:
    places = [module.PLACE for module in statements().values()]
    assert len(set(places)) == len(places) >= 12 and sorted(places) == places
    for module in statements().values():
        assert module.TITLE and module.WORDS and module.FORMULA and module.FALSIFIED_BY
        assert callable(module.check) and callable(module.figure)


def test_a_failure_says_what_it_may_be_and_how_to_see_it_alone(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", mine, "--seed", "7", "--fast"]) == 1
    said = capsys.readouterr().out
    again = "sdeblend verify --seed 7 --fast --only 'arithmetic:one and one less two'"
    assert "This may be a finding" in said and "seed 7" in said and again in said
    assert command.main(["--only", "arithmetic:one and one less two", "--seed", "7"]) == 1
    alone = capsys.readouterr().out
    assert "one and one" in alone and "twice two" not in alone
    assert command.main(["--only", "arithmetic:twice two", "--seed", "7"]) == 0
    with pytest.raises(ValueError, match="one and one less two; twice two less four; got 'thrice'"):
        command.main(["--only", "arithmetic:thrice", "--seed", "7"])


def test_what_it_says_fits_a_hundred_columns() -> None:
    long = Measurement("a measurement " * 9, 1.234e-13, "<=", 1e-10, "a control that was broken " * 6, math.nan)
    text = terminal.outcomes_text({"closed_forms": Outcome([long], findings=["words " * 80])})
    assert max(map(len, text.splitlines())) <= terminal.WIDTH
    assert "1.23e-13" in text and "NO POWER" in text and text.split().count("measurement") == 9


def test_many_seeds_go_on_where_they_were(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    file, record = tmp_path / "seeds.jsonl", tmp_path / "seeds.json"
    given = ["--only", mine, "--into", str(file), "--record", str(record), "--fast"]
    assert command.main([*given, "--seeds", "5:7"]) == 0
    ran: list[int] = []
    right = runner.run_check

    def run_check(name: str, settings: Settings) -> Outcome:
        ran.append(settings.seed)
        return right(name, settings)

    monkeypatch.setattr(runner, "run_check", run_check)
    assert command.main([*given, "--seeds", "5:9"]) == 1
    assert ran == [7, 8]
    assert [(line.seed, line.failed) for line in seeds.read(file)][2:] == [(7, ["one and one less two"]), (8, [])]
    said = capsys.readouterr().out
    assert "one and one less two: sdeblend verify --seed 7 --fast --only arithmetic" in said
    monkeypatch.setattr(seeds, "RECORD", record)
    assert seeds.recorded() == {"arithmetic": seeds.Count(fast=4, full=0, failed=1)}
    for wrong in ("9:5", "5", "a:b", "-1:5"):
        with pytest.raises(ValueError, match="FIRST:END"):
            command.main([*given, f"--seeds={wrong}"])


def test_a_check_that_stops_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "statement", lambda name: None)
    outcome = runner.run_check("closed_forms", Settings())
    assert not outcome.passed and "the check stopped" in outcome.findings[0]


def test_slope_is_the_power() -> None:
    assert slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_what_is_on_record_is_of_statements_that_there_are_and_none_failed() -> None:
    assert set(seeds.recorded()) <= set(statements())
    assert not [name for name, count in seeds.recorded().items() if count.failed]
