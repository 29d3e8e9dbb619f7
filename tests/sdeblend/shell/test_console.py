"""Tables fit a terminal and are plain in a pipe; bars are for terminals."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from sdeblend.shell.console import markdown, progress, table, track

HEADER = ["method", *(f"x{i}" for i in range(1, 13))]
ROWS = [[name, *(f"{i / 7:.4f} ± 0.1234" for i in range(1, 13))] for name in ("exact target", "mpa [b]")]


def test_columns_are_aligned() -> None:
    assert table(["method", "W2", "n"], [["exact", "0.1 ± 0.2", "7"], ["ls-shared", "1", ""]]).splitlines() == [
        "method            W2  n",
        "exact      0.1 ± 0.2  7",
        "ls-shared          1",
    ]


def test_short_rows_and_no_header() -> None:
    assert table(["", ""], [["a"], ["bb", "1"]]) == "a\nbb  1"
    assert table(["what", "words"], [["a", "x"], ["b", "yy"]], left=2) == "what  words\na     x\nb     yy"


def test_without_a_width_a_line_is_as_long_as_it_needs() -> None:
    lines = table(HEADER, ROWS).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("mpa [b] ") and lines[2].endswith(ROWS[1][-1])


@pytest.mark.parametrize("width", [60, 120])
def test_a_wide_table_is_set_below_itself(width: int) -> None:
    text = table(HEADER, ROWS, width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("mpa [b]") for line in lines) == text.count("method") == len(text.split("\n\n")) > 1
    assert all(text.count(entry) == 2 for entry in ROWS[0][1:])
    assert table(HEADER[:3], [row[:3] for row in ROWS], width=width) == table(HEADER[:3], [row[:3] for row in ROWS])


def test_a_cell_that_is_too_wide_is_folded() -> None:
    lines = table(["key", "meaning"], [["steps", "how many steps " * 9]], left=2, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert " ".join(line[5:].strip() for line in lines[1:]).split() == ("how many steps " * 9).split()


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", ""], ["", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | |\n| | 2 |"


PROGRAM = """
from sdeblend.shell.console import progress, show_table, track
show_table(["method", *"abcdefghi"], [["mpa", *["0.1234 ± 0.1"] * 9]])
for _ in track([1, 2, 3], "cells", unit="cells"): pass
with progress("training", 2, unit="rounds") as bar:
    bar.update(note="reward [1, 2]")
    print("said meanwhile")
    bar.restart("more", 1)
    bar.update()
with progress("nothing", 2, quiet=True) as bar: bar.update()
"""


def test_a_pipe_gets_the_text_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and len(lines[1]) > 100 and lines[2] == "said meanwhile"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [60, 120])
def test_a_terminal_gets_bars_and_lines_that_fit(columns: int) -> None:
    ours, theirs = pty.openpty()
    # Not the terminal's own size, which is 0 x 0 here.
    env = os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    try:
        with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs, env=env) as process:
            os.close(theirs)
            said = b""
            try:
                while part := os.read(ours, 65536):
                    said += part
            except OSError:  # the other end is closed
                pass
            assert process.wait(timeout=60) == 0
    finally:
        os.close(ours)
    text = said.decode()
    lines = [line.rstrip("\r") for line in text.partition("cells")[0].splitlines()]
    first = [line for line in lines if line and "\x1b" not in line]
    assert max(map(len, first)) <= columns
    assert sum(line.startswith("mpa") for line in first) == {60: 3, 120: 2}[columns]
    assert "cells" in text and "3/3" in text and "reward [1, 2]" in text and "said meanwhile" in text
    assert "nothing" not in text


def test_bars_are_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 3) as bar:
        bar.update(note="x")
        bar.restart("more", 2)
    assert list(track([1, 2], "cells")) == [1, 2]
    assert capsys.readouterr() == ("", "")
