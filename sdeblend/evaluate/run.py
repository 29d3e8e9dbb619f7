"""Running a plan: cell by cell, by one process or by several, each cell stored as soon as it is finished.

Cell i belongs to process (i + i // methods) modulo their number, so that each process has its share of every method.
A cell depends on nothing but the plan: one process or many, in one go or resumed, the rows are the same.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

import torch

from sdeblend.evaluate.backend import Backend, MeasuredCase
from sdeblend.evaluate.config import FORMAT, Cell, Plan
from sdeblend.evaluate.rows import Folder, Row, number
from sdeblend.methods.case import Drawn, NotApplicable
from sdeblend.methods.draws import Draws, clock
from sdeblend.methods.registry import METHODS

# Whose version may change a number.
_PACKAGES: Final = (
    "sdeblend", "torch", "diffusers", "transformers", "peft", "numpy", "scipy", "pillow", "moocore",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: this one's number.
        size: how many.
        device: this one's.
        wait: returns when all have called it.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wait: Callable[[], None] = lambda: None

    def owns(self, index: int, methods: int) -> bool:
        """Return whether cell ``index`` is this process's."""
        return (index + index // methods) % self.size == self.rank


def world() -> World:
    """Return the processes that ``accelerate launch`` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available():
        return World()
    from accelerate import PartialState

    state = PartialState()
    return World(state.process_index, state.num_processes, state.device, state.wait_for_everyone)


@runtime_checkable
class Scaled(Protocol):
    """A backend that reports rewards in units of a scale.

    Attributes:
        scales: name, scale (what is divided by), unit (of the value before) and variants, one for each reward.
    """

    scales: Sequence[Mapping[str, Any]]


def manifest(plan: Plan, backend: Backend) -> dict[str, Any]:
    """Return what pins the results: what decides the samples, and how they are told."""
    identity = {f"identity.{key}": value for key, value in _flat(backend.identity)}
    return {
        "format": FORMAT,
        "title": plan.title,
        "fixed": {**plan.fixed(), "prompts": list(backend.prompts), **_versions(), **identity},
        "variants": [
            {**asdict(v), "rewards": list(v.rewards), "values": dict(v.values), "group": v.together}
            for v in backend.variants
        ],
        "prompts": list(backend.prompts),
        "rewards": [dict(reward) for reward in backend.scales] if isinstance(backend, Scaled) else [],
        "report": dict(plan.report),
        "published": [dict(row) for row in plan.published],
    }


def _versions() -> dict[str, str]:
    """Return the versions of what computes and measures, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[f"version.{name}"] = importlib.metadata.version(name)
    return found


def _flat(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of mappings, with their path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def evaluate(plan: Plan, folder: Folder, *, resume: bool = False, processes: World | None = None) -> list[str]:
    """Compute the cells of a plan that are not there yet.

    Args:
        plan: what to run.
        folder: where results go.
        resume: continue in a folder that has some.
        processes: this process among others; asked of accelerate if left out.

    Returns:
        one sentence a cell that failed or was stored damaged and computed again; of this process.

    Raises:
        ValueError: for a folder of another configuration, or a plan that its backend cannot use.
    """
    from tqdm import tqdm

    processes = world() if processes is None else processes
    backend = plan.backend(processes.device)
    if processes.rank == 0:
        folder.open(manifest(plan, backend), resume=resume)
    processes.wait()
    notes: list[str] = []
    mine = [(i, c) for i, c in enumerate(plan.cells(backend)) if processes.owns(i, len(plan.methods))]
    todo: list[tuple[int, Cell, str]] = []
    for index, cell in mine:
        key = plan.key(cell, backend)
        damage = folder.damage(key) if folder.started(key) else ""
        if damage:
            notes.append(f"{damage.split(';')[0]}; computed again")
        if damage is not None:
            todo.append((index, cell, key))
    held: tuple[tuple[str, str], MeasuredCase] | None = None
    draws: Draws | None = None
    bar = tqdm(
        todo, desc=f"{plan.title}, process {processes.rank}" if processes.size > 1 else plan.title, unit="cell",
        disable=None if processes.rank == 0 else True, file=sys.stderr, initial=len(mine) - len(todo), total=len(mine),
    )  # fmt: skip
    for index, cell, key in bar:
        bar.set_postfix_str(cell.method, refresh=False)
        if held is None or held[0] != (cell.variant, cell.prompt):
            held = (cell.variant, cell.prompt), backend.case(cell.variant, cell.prompt)
        if draws is None or (draws.prompt, draws.seeds) != (cell.prompt, tuple(cell.seeds)):
            draws = Draws(plan.seed, cell.prompt, cell.seeds)
        head, rows = compute(plan, cell, held[1], draws, folder, key)
        if head.get("failed"):
            notes.append(f"{cell.method} on {cell.variant}: {head['failed']}")
        notes += held[1].failures
        folder.write(key, {"index": index, **head}, rows)
    processes.wait()
    return notes


def compute(
    plan: Plan, cell: Cell, case: MeasuredCase, draws: Draws, folder: Folder, key: str
) -> tuple[dict[str, Any], list[Row]]:
    """Sample one cell and measure it.

    Returns:
        what is said of the cell, and its rows; no rows if the method does not apply ("left_out") or ends in an error,
        its own or a reward's ("failed").
    """
    method, wanted = METHODS[cell.method], cell.wanted
    case.begin(folder.path, key)
    try:
        # Preference in the end, and remembered: what is prepared for a first run falls to no method.
        case.base_samples(draws)
        start = clock() - draws.seconds
        drawn = method.sample(case, wanted, draws, plan.options[cell.method])
        seconds = clock() - draws.seconds - start
    except NotApplicable as reason:
        return {**cell.spec(), "left_out": str(reason)}, []
    except Exception as error:
        return {**cell.spec(), "failed": _why(error)}, []
    if not bool(drawn.samples.isfinite().all()):
        bad = int((~drawn.samples.isfinite()).flatten(1).any(1).nonzero()[0])
        return {**cell.spec(), "failed": f"sample {bad} is not finite"}, []
    distances, measures = case.measure(drawn, wanted), case.describe(drawn, draws)
    head = {
        **cell.spec(),
        "model_calls": drawn.model_calls,
        "gradient_calls": drawn.gradient_calls,
        "reward_calls": drawn.reward_calls,
        "seconds": seconds,
        "facts": {name: number(value) for name, value in drawn.facts.items()},
        "measures": {name: number(value) for name, value in measures.items()},
        "target": {name: number(value) for name, value in case.expected(wanted).items()},
        "distances": {
            name: [None if v is None else number(v) for v in (d.value, d.floor, d.floor_sd)]
            for name, d in distances.items()
        },
    }
    return head, _rows(cell, case, drawn, folder, key)


def _why(error: Exception) -> str:
    """Return what went wrong, one phrase: the type, unless it is a number that is not finite, and the first line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, FloatingPointError) and lines:
        return lines[0]
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


def _rows(cell: Cell, case: MeasuredCase, drawn: Drawn, folder: Folder, key: str) -> list[Row]:
    found = case.rewards(drawn.samples)
    rewards = {name: value.detach().double().cpu().tolist() for name, value in found.items()}
    log_weights = [0.0] * cell.count
    if drawn.log_weights is not None:
        # Of mean one, so that blocks count alike.
        normal = drawn.log_weights.double().log_softmax(0) + torch.tensor(float(cell.count)).double().log()
        log_weights = normal.cpu().tolist()
    ancestors = range(cell.count) if drawn.ancestors is None else drawn.ancestors.tolist()
    columns = case.keep(drawn.samples, folder.path, key)
    rows: list[Row] = []
    for i, (seed, ancestor) in enumerate(zip(cell.seeds, ancestors, strict=True)):
        values = {name: number(value[i]) for name, value in rewards.items()}
        parts = [None if (v := values[name]) is None else w * v for name, w in cell.weights if w]
        rows.append(
            {
                "method": cell.method,
                "variant": cell.variant,
                "preference": dict(cell.weights),
                "strength": cell.strength,
                "prompt": cell.prompt,
                "seed": seed,
                "ancestor": cell.seeds[ancestor],
                "rewards": values,
                "weighted": None if None in parts else number(sum(p for p in parts if p is not None)),
                "log_weight": number(log_weights[i]),
                "model_calls": drawn.model_calls,
                "gradient_calls": drawn.gradient_calls,
                "reward_calls": drawn.reward_calls,
                **{name: values[i] for name, values in columns.items()},
            }
        )
    return rows
