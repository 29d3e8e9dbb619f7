"""Running a plan: cell by cell, by one process or by several, each cell stored as soon as it is finished.

Cell i belongs to process (i + i // methods) modulo their number, so that each process has its share of every method.
A cell depends on nothing but the plan: one process or many, in one go or resumed, the rows are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

import torch
from pydantic import JsonValue

from sdeblend.evaluate.backend import Backend, MeasuredCase
from sdeblend.evaluate.plan import FORMAT, Cell, Plan
from sdeblend.evaluate.results import Distance, number, rounded
from sdeblend.evaluate.store import CellRecord, Folder, Manifest, Row
from sdeblend.methods.case import Drawn, NotApplicable
from sdeblend.methods.draws import Draws, clock
from sdeblend.methods.registry import METHODS
from sdeblend.shell.console import progress
from sdeblend.shell.processes import Processes, processes
from sdeblend.shell.registry import versions

# Whose version may change a number.
_PACKAGES: Final = (
    "sdeblend", "torch", "diffusers", "transformers", "peft", "numpy", "scipy", "pillow", "moocore",
)  # fmt: skip


def manifest(plan: Plan, backend: Backend) -> Manifest:
    """Return what pins the results: what decides the samples, and how they are shown."""
    pinned: dict[str, JsonValue] = {f"version.{name}": version for name, version in versions(_PACKAGES).items()}
    pinned |= {f"identity.{key}": value for key, value in _flat(backend.identity)}
    return Manifest(
        format=FORMAT,
        title=plan.title,
        fixed={**plan.fixed(), "prompts": list(backend.prompts), **pinned},
        variants=tuple(replace(variant, group=variant.together) for variant in backend.variants),
        prompts=tuple(backend.prompts),
        rewards=tuple(backend.scales),
        report=plan.report,
        published=plan.published,
    )


def _flat(tree: Mapping[str, JsonValue], head: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Yield the leaves of a tree of mappings, with their path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def evaluate(plan: Plan, folder: Folder, *, resume: bool = False, world: Processes | None = None) -> list[str]:
    """Compute the cells of a plan that are not there yet.

    Args:
        plan: what to run.
        folder: where results go.
        resume: continue in a folder that has some.
        world: this process among others; those that were launched if left out.

    Returns:
        one sentence a cell that failed or was stored damaged and computed again; of this process.

    Raises:
        ValueError: for a folder of another configuration, or a plan that its backend cannot use.
    """
    world = world or processes()
    backend = plan.backend(world.device)
    if world.main:
        folder.open(manifest(plan, backend), resume=resume)
    world.wait()
    notes: list[str] = []
    todo: list[tuple[int, Cell, str]] = []
    mine = 0
    for index, cell in enumerate(plan.cells(backend)):
        if (index + index // len(plan.grid.methods)) % world.count != world.index:
            continue
        mine += 1
        key = plan.key(cell, backend)
        damage = folder.damage(key) if folder.started(key) else ""
        if damage:
            notes.append(f"{damage.split(';')[0]}; computed again")
        if damage is not None:
            todo.append((index, cell, key))
    what = f"{plan.title}, process {world.index}" if world.count > 1 else plan.title
    held: tuple[tuple[str, str], MeasuredCase] | None = None
    draws: Draws | None = None
    with progress(what, mine, unit="cells", done=mine - len(todo), quiet=not world.main) as bar:
        for index, cell, key in todo:
            if held is None or held[0] != (cell.variant, cell.prompt):
                held = (cell.variant, cell.prompt), backend.case(cell.variant, cell.prompt)
            if draws is None or (draws.prompt, draws.seeds) != (cell.prompt, tuple(cell.seeds)):
                draws = Draws(plan.grid.seed, cell.prompt, cell.seeds)
            bar.update(0, note=cell.method)
            record, rows = compute(plan, index, cell, held[1], draws, folder, key)
            notes += [f"{cell.method} on {cell.variant}: {record.failed}"] if record.failed else []
            notes += held[1].failures
            folder.write(key, record, rows)
            bar.update()
    world.wait()
    return notes


def compute(
    plan: Plan, index: int, cell: Cell, case: MeasuredCase, draws: Draws, folder: Folder, key: str
) -> tuple[CellRecord, list[Row]]:
    """Sample one cell and measure it.

    Returns:
        the cell and its rows; no rows if the method does not apply (``left_out``) or ends in an error, its own or a
        reward's (``failed``).
    """
    method, record = METHODS[cell.method], CellRecord(index=index, **cell.spec())
    case.begin(folder.path, key)
    try:
        # Asked for in the end, and remembered: what is prepared for a first run falls to no method.
        case.base_samples(draws)
        start = clock() - draws.seconds
        drawn = method.sample(case, cell.preference, draws, plan.options[cell.method])
        seconds = clock() - draws.seconds - start
    except NotApplicable as reason:
        return record.model_copy(update={"left_out": str(reason)}), []
    except Exception as error:
        return record.model_copy(update={"failed": _why(error)}), []
    if not bool(drawn.samples.isfinite().all()):
        bad = int((~drawn.samples.isfinite()).flatten(1).any(1).nonzero()[0])
        return record.model_copy(update={"failed": f"sample {bad} is not finite"}), []
    distances, measures = case.measure(drawn, cell.preference), case.describe(drawn, draws)
    found = CellRecord(
        index=index,
        **cell.spec(),
        model_calls=drawn.model_calls,
        gradient_calls=drawn.gradient_calls,
        reward_calls=drawn.reward_calls,
        seconds=seconds,
        facts=_numbers(drawn.facts),
        measures=_numbers(measures),
        target=_numbers(case.expected(cell.preference)),
        distances={
            name: Distance(rounded(d.value), d.floor and rounded(d.floor), d.floor_sd and rounded(d.floor_sd))
            for name, d in distances.items()
        },
    )
    return found, _rows(cell, case, drawn, folder, key)


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: number(value) for name, value in values.items()}


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
    columns, weights = case.keep(drawn.samples, folder.path, key), case.weights(cell.preference)
    rows = []
    for i, (seed, ancestor) in enumerate(zip(cell.seeds, ancestors, strict=True)):
        values = {name: number(value[i]) for name, value in rewards.items()}
        parts = [None if (v := values[name]) is None else w * v for name, w in weights.items() if w]
        rows.append(
            Row(
                method=cell.method,
                variant=cell.variant,
                preference=weights,
                strength=float(cell.preference.strength),
                prompt=cell.prompt,
                seed=seed,
                ancestor=cell.seeds[ancestor],
                rewards=values,
                weighted=None if None in parts else number(sum(p for p in parts if p is not None)),
                log_weight=number(log_weights[i]),
                model_calls=drawn.model_calls,
                gradient_calls=drawn.gradient_calls,
                reward_calls=drawn.reward_calls,
                **{name: values[i] for name, values in columns.items()},
            )
        )
    return rows
