"""The check of tuned members passes, rejects its controls and draws its figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs_checks import members
from proofs_checks.harness.check import Settings


@pytest.mark.slow
def test_check_passes_with_power_and_draws_its_figure() -> None:
    outcome = members.check(Settings(seed=1, fast=True))
    assert [m.what for m in outcome.measurements if not m.passed] == []
    axes = members.figure(outcome).axes
    assert all(ax.get_title(loc="left") and ax.get_ylabel() and ax.get_legend() for ax in axes)


def test_the_record_of_all_trainers_is_that_of_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "members.md"
    record.write_text("# members\n\nMeasured so.\n\n| trainer | slope |\n| --- | --- |\n| ddpo | 0.97 |\n\n| other |\n")
    monkeypatch.setattr(members, "RECORD", record)
    found = members.recorded()
    assert found
    words, headings, rows = found
    assert words.endswith("Measured so.") and (headings, rows) == (["trainer", "slope"], [["ddpo", "0.97"]])
    record.unlink()
    assert members.recorded() is None
    monkeypatch.undo()
    found = members.recorded()
    assert found
    _, headings, rows = found
    assert {"trainer", "slope"} <= set(headings)
    assert {"regression", "adjoint", "backprop", "dpok", "ddpo"} <= {row[0] for row in rows}
