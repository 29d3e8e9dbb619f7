"""Names of other trainers: the pipeline's own loader translates them, and each layer is found again in the file.

A loader renames layers, cuts joint projections in three, turns halves around and multiplies factors by alpha / rank,
and says of none of it what it did, nor what it left out. But the rows of a layer's change B A are rows of the file's
changes, whatever was renamed or cut. So each change is projected on a few random directions of its input, B (A W), and
every row of a layer is looked up among the rows of the file: there are the scale that is its due and whatever else the
file says of these rows; rows of the file that no layer has did not load.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stablediffusion.adapters.files import LoraFile
from stablediffusion.adapters.layouts import Change, changes_of, some, where_of
from stablediffusion.pipelines.loading import no_false_alarms

_PROBES = 8
_CHUNK = 64  # rows that are looked up at a time
_TRIES = 32
_EXACT = 1e-5  # relative, of products
# what the file itself is asked for, row by row
_LEFT_OUT = ("dora_scale", "diff_b", ".diff")


def converted(pipe: Any, file: LoraFile, said: Mapping[str, Change]) -> dict[str, Change]:
    """Return what a file in the names of another trainer changes, by layers in the names of diffusers.

    Args:
        pipe: whose loader knows the names.
        file: the file.
        said: what it says, ``changes_of(file)``.

    Returns:
        the changes by ``component.layer``.

    Raises:
        ValueError: for names that the loader does not know, and for whatever it leaves out or changes.
    """
    given = {key: value.clone() for key, value in file.tensors.items() if not key.endswith(_LEFT_OUT)}
    options = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    try:
        with no_false_alarms(checked=True):
            result = pipe.lora_state_dict(given, return_lora_metadata=True, **options)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"a LoRA must be in names that {type(pipe).__name__} knows, got {some(said)} in {where_of(file)} "
            f"({detail[:120]}); use a LoRA of this model family"
        ) from error
    tensors = result[0] if isinstance(result, tuple) else result
    made = changes_of(LoraFile(dict(tensors), None, file.path))
    rows = _Rows(said)
    found = {name: rows.change(name, change, file) for name, change in made.items()}
    missing = rows.missing()
    if missing:
        raise ValueError(
            f"a LoRA must load whole or not at all, got {some(missing)} in {where_of(file)}, which "
            f"{type(pipe).__name__} does not load; use a LoRA of this model family"
        )
    return found


@dataclass
class _Pool:
    """The rows of all changes of one input width: B (A W), whose they are and where there, their scale."""

    values: Tensor
    owner: list[str]
    start: Tensor
    place: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        self.covered = self.values.norm(dim=1) == 0
        # as they are, and as a loader has them that multiplies factors by their scale
        self.both = (self.values, self.values * self.scale[:, None])
        # by length, so that a row's like are next to it, and among few if it is a long one
        self._sorted = [values.norm(dim=1).sort() for values in self.both]

    def near(self, row: Tensor, distance: float) -> Tensor:
        """Return which rows are, in one way or the other, within a distance of one."""
        found = []
        for values, (keys, order) in zip(self.both, self._sorted, strict=True):
            ends = torch.searchsorted(keys, row.norm() + torch.tensor([-distance, distance], dtype=row.dtype))
            index = order[int(ends[0]) : int(ends[1]) + 1]
            found.append(index[(values[index] - row).norm(dim=1) <= distance])
        return torch.cat(found).unique()


class _Rows:
    """The rows of a file's changes, to be found again."""

    def __init__(self, said: Mapping[str, Change]) -> None:
        self.said = said
        self._pools: dict[int, _Pool] = {}
        widths: dict[int, list[str]] = {}
        for name, change in said.items():
            widths.setdefault(change.down[0].numel(), []).append(name)
        for width, names in widths.items():
            sizes = torch.tensor([len(said[name].up) for name in names])
            values = torch.cat([_projected(said[name]) for name in names])
            self._pools[width] = _Pool(
                values=values,
                owner=names,
                start=(sizes.cumsum(0) - sizes).repeat_interleave(sizes),
                place=torch.arange(len(names)).repeat_interleave(sizes),
                scale=torch.tensor([said[name].scale for name in names], dtype=torch.float64).repeat_interleave(sizes),
            )

    def change(self, name: str, made: Change, file: LoraFile) -> Change:
        """Return what a layer's change is due, by the rows of the file that it consists of."""
        rows, pool = _projected(made), self._pools.get(made.down[0].numel())
        if not rows.any():
            return replace(made, scale=1.0, bias=None)
        tolerance = _EXACT + 4 * max(torch.finfo(made.down.dtype).eps, torch.finfo(made.up.dtype).eps)
        index = None if pool is None else _found(rows, pool, tolerance)
        if pool is None or index is None:
            raise ValueError(
                f"a layer must change as the file says, got another change for {name} from {where_of(file)}, whose "
                f"names {'or strength ' if pool else ''}the pipeline's loader takes otherwise; convert the file first"
            )
        pool.covered[index] = True
        scales, apart = pool.scale[index], _far(rows, pool.values[index], tolerance)
        due = 1.0 if apart else float(scales[0])
        if not apart and (scales != due).any():
            raise ValueError(
                f"a layer must change by one strength, got {sorted(set(scales.tolist()))} for {name} from "
                f"{where_of(file)}; convert the file first"
            )
        bias, lengths = (self._beside(pool, index, kind) for kind in ("bias", "lengths"))
        if bias is not None and due != 0:
            bias = (bias.double() * scales / due).to(made.up.dtype)
        return replace(made, scale=due, bias=bias, lengths=lengths)

    def _beside(self, pool: _Pool, index: Tensor, kind: str) -> Tensor | None:
        """Return what the file says beside the factors of some rows."""
        places = pool.place[index].unique().tolist()
        beside = {place: getattr(self.said[pool.owner[place]], kind) for place in places}
        if all(value is None for value in beside.values()):
            return None
        rows = [beside[int(pool.place[i])][int(i - pool.start[i])] for i in index]
        return torch.stack(rows)

    def missing(self) -> list[str]:
        """Return the names in the file of which some rows were not found in any layer."""
        return [
            pool.owner[place] for pool in self._pools.values() for place in pool.place[~pool.covered].unique().tolist()
        ]


def _found(rows: Tensor, pool: _Pool, tolerance: float) -> Tensor | None:
    """Return which rows of the file a layer's rows are, plain or already times their scale; None if they are none."""
    norms = rows.norm(dim=1)
    first = int(norms.argmax())
    for distance in (_EXACT, 2 * tolerance):  # most loaders change no factor
        row = pool.near(rows[first], distance * float(norms[first]))
        # of twins, one that no layer has yet, and whole layers before parts
        order = (2 * pool.covered[row].int() + (row - first != pool.start[row]).int()).argsort(stable=True)
        for start in (row[order][:_TRIES] - first).tolist():
            index = torch.arange(start, start + len(rows))
            inside = start >= 0 and start + len(rows) <= len(pool.values) and pool.place[start] == pool.place[index[-1]]
            if inside and any(not _far(rows, values[index], tolerance) for values in pool.both):
                return index
    # turned around, or put together
    for values in pool.both:
        index = torch.cat([torch.cdist(part.float(), values.float()).argmin(1) for part in rows.split(_CHUNK)])
        if not _far(rows, values[index], tolerance):
            return index
    return None


def _far(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() > tolerance * one.norm())


def _projected(change: Change) -> Tensor:
    """Return the rows of B A on a few directions, (out, probes), float64."""
    down, up = change.down.flatten(1).double(), change.up.flatten(1).double()
    return up @ (down @ _probes(down.shape[1]))


@functools.cache
def _probes(width: int) -> Tensor:
    return torch.randn(width, _PROBES, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
