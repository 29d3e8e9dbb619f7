"""Runs the checks, each in a process of its own, and prints the table."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace

from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.statements import statement, statements


def run_check(name: str, settings: Settings) -> Outcome:
    """Run one statement's check and time it; a crash is an outcome that has not passed."""
    import torch

    # One thread a check: the checks run side by side, and results do not depend on the number of cores.
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        outcome = statement(name).check(settings)
    except Exception:
        outcome = Outcome([], findings=["the check stopped: " + traceback.format_exc(limit=-3)])
    return replace(outcome, seconds=time.perf_counter() - start)


def run_checks(
    settings: Settings, names: Sequence[str], workers: int | None = None
) -> Iterator[tuple[str, Outcome]]:
    """Yield (name, outcome) of each check as it ends.

    Args:
        settings: seed and size.
        names: modules of ``proofs_checks``.
        workers: processes; one a core by default.
    """
    count = min(workers or os.cpu_count() or 1, len(names))
    if count == 1:
        for name in names:
            yield name, run_check(name, settings)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        pending: dict[Future[Outcome], str] = {pool.submit(run_check, name, settings): name for name in names}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            for future in pending:
                future.cancel()


def number(value: float) -> str:
    """Return a number in four figures at most."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def measurement_line(m: Measurement) -> str:
    """Return one line of the table."""
    verdict = "pass" if m.passed else ("FAIL" if not m.holds else "NO POWER")
    control = f"{m.control}: {number(m.control_value)} {'rejected' if m.has_power else 'NOT rejected'}"
    return (
        f"  {verdict:<8} {m.what:<62} {number(m.value):>9} {m.relation} {number(m.bound):<8} "
        f"margin {number(m.margin):<8} control, {control}"
    )


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the table of a run: statement, what was measured, bound, margin, control and verdict."""
    lines = []
    for name in [n for n in statements() if n in outcomes]:
        outcome = outcomes[name]
        lines.append(f"{statement(name).TITLE}  ({outcome.seconds:.1f} s)")
        lines += [measurement_line(m) for m in outcome.measurements]
        lines += [f"           {finding}" for finding in outcome.findings]
    passed = sum(outcome.passed for outcome in outcomes.values())
    rows = [m for outcome in outcomes.values() for m in outcome.measurements]
    lines.append("")
    lines.append(
        f"{passed} of {len(outcomes)} statements hold: {sum(m.holds for m in rows)} of {len(rows)} measurements within "
        f"their bounds, {sum(m.has_power for m in rows)} of {len(rows)} controls rejected"
    )
    return "\n".join(lines)


def as_json(outcomes: dict[str, Outcome], settings: Settings) -> dict[str, object]:
    """Return a run as plain values: seed, and each statement's measurements and findings."""
    statements = {
        name: {
            "title": statement(name).TITLE,
            "passed": outcome.passed,
            "seconds": round(outcome.seconds, 3),
            "measurements": [
                {
                    "what": m.what, "value": m.value, "relation": m.relation, "bound": m.bound,
                    "margin": m.margin if math.isfinite(m.margin) else None, "passed": m.passed,
                    "control": m.control, "control_value": m.control_value, "control_rejected": m.has_power,
                }
                for m in outcome.measurements
            ],
            "findings": outcome.findings,
        }
        for name, outcome in outcomes.items()
    }
    return {"seed": settings.seed, "fast": settings.fast, "statements": statements}
