"""Runs checks, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter

from proofs_checks.harness.check import Outcome, Settings
from proofs_checks.harness.statements import statement

Job = tuple[str, Settings]


def run_check(name: str, settings: Settings) -> Outcome:
    """Run one statement's check and time it; a crash is an outcome that has not passed."""
    # One thread a check: the checks run side by side, and results do not depend on the number of cores.
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        outcome = statement(name).check(settings)
    except Exception:
        outcome = Outcome([], findings=["the check stopped: " + traceback.format_exc(limit=-3)])
    return replace(outcome, seconds=time.perf_counter() - start)


def run_checks(jobs: Sequence[Job], workers: int | None = None) -> Iterator[tuple[Job, Outcome]]:
    """Yield each check's outcome as it ends.

    Args:
        jobs: names of statements, and seed and size.
        workers: processes; one a core by default.
    """
    count = min(workers or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        yield from ((job, run_check(*job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        pending: dict[Future[Outcome], Job] = {pool.submit(run_check, *job): job for job in jobs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            for future in pending:
                future.cancel()


def as_json(outcomes: dict[str, Outcome], settings: Settings) -> dict[str, Any]:
    """Return a run as plain values: seed, and each statement's measurements and findings."""
    plain = TypeAdapter(Outcome).dump_json  # numbers that JSON lacks become null
    return {
        "seed": settings.seed,
        "fast": settings.fast,
        "statements": {
            name: {"title": statement(name).TITLE, **json.loads(plain(outcome))} for name, outcome in outcomes.items()
        },
    }
