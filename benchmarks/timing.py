"""How things are timed: candidates in turn, round after round, so that a drifting machine cancels in the ratio."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sdeblend.shell.console import markdown
from sdeblend.shell.files import write_atomically

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Race:
    """Seconds of each candidate in each round.

    Attributes:
        seconds: name -> one number a round, all lists of one length.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of one candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Return the median, least and greatest ratio slow/fast over the rounds."""
        ratios = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def race(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Race:
    """Time the candidates in turn; one round before is not counted.

    Args:
        candidates: name -> what to run.
        rounds: counted rounds.
        clock: wall time; or ``time.process_time`` for long runs on one thread, which other processes do not stretch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    return Race(seconds)


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        names = [line.split(":", 1)[1].strip() for line in lines]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows (what, value, unit, target, met, against) beside the machine's name, as JSON and a table."""
    about = machine()
    write_atomically(RESULTS / f"{name}.json", json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    header = ("what", "measured", "aim", "met", "detail")
    lines = [
        (row["what"], f"{row['value']:.3g} {row['unit']}", row.get("aim", ""), _verdict(row), row.get("detail", ""))
        for row in rows
    ]
    where = ", ".join(
        [about["processor"], f"{about['cores']} cores", f"{about['threads']} thread(s)"]
        + ([about["gpu"]] if about["gpu"] else [])
        + [f"torch {about['torch']}", about["date"]]
    )
    text = f"# {name}\n\nMeasured by `python -m benchmarks.{name}` on {where}.\n\n{markdown(header, lines)}\n"
    path = RESULTS / f"{name}.md"
    write_atomically(path, text)
    print(text)
    return path


def _verdict(row: dict[str, Any]) -> str:
    met = row.get("met")
    return "" if met is None else ("yes" if met else "NO")
