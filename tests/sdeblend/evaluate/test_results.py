"""Results that are kept with the project, and the one codec: what is read is what was written."""

import json
from pathlib import Path

import pytest

from sdeblend.evaluate.compare import main as compare
from sdeblend.evaluate.report import read_summaries
from sdeblend.evaluate.results import Interval, Summary
from sdeblend.evaluate.store import Folder
from sdeblend.evaluate.tables import markdown
from tests.support.strategies import refuses

KEPT = sorted((Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "evaluate").iterdir())


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_tables_of_kept_results_come_back_from_their_summary(folder):
    summaries = read_summaries(Folder(folder))
    assert "\n".join(map(markdown, summaries)) == (folder / "tables.md").read_text()
    for summary in summaries:
        again = Summary.model_validate_json(summary.written())
        assert again.written() == summary.written() and markdown(again) == markdown(summary)
        assert "null" not in markdown(summary) and "nan" not in markdown(summary)


def test_compare_takes_a_folder_without_rows(tmp_path, capsys):
    (folder,) = (folder for folder in KEPT if folder.name == "das-grid")
    assert compare([str(folder), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "tables.md").read_bytes() == (folder / "tables.md").read_bytes()
    assert "tables.md" in capsys.readouterr().out
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text(json.dumps({"title": "t"}))
    refuses(lambda: compare([str(tmp_path / "broken")]), "not a summary", "Field required")


def test_a_number_that_is_not_known_is_null():
    interval = Interval(value=1.0, low=float("nan"), high=float("nan"))
    assert json.loads(interval.written()) == {"value": 1.0, "low": None, "high": None}
    assert Interval.model_validate_json(interval.written()).written() == interval.written()
    assert not interval.excludes(5.0) and Interval(value=1, low=0, high=2).excludes(5.0)
