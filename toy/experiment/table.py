"""An experiment's report as text for people: the target, the methods, and what each measured beside the exact value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdeblend.shell.console import table

SHOWN = 10
PIPED = 120  # characters a line where there is no terminal to fit
_ABSENT = "-"


def report_table(report: Mapping[str, Any], width: int | None = None) -> str:
    """Return a report as text.

    Args:
        report: as ``toy.experiment.run`` makes it.
        width: characters a line; 120 if left out.

    Returns:
        lines without a final newline; of long vectors the first ten entries.
    """
    width = width or PIPED
    target, methods = report["target"], report["methods"]
    closed = [row["log_normalizer_closed_form"] for row in methods.values()]
    known = next((value for value in closed if value is not None), None)
    parts = [
        f"exact target, log Z = {_number(target['log_normalizer'])} (of base exp(strength r(w) / kl_weight))",
        "",
        table(_HEAD, [_row(name, row) for name, row in methods.items()], width=width),
    ]
    if known is not None:
        parts.append(f"log E[W] in closed form: {_number(known)} (log Z less the members', blended)")
    parts += [f"{name}: {row['certificate_note']}" for name, row in methods.items() if _worth_saying(row)]
    axes = [f"x{i + 1}" for i in range(len(target["mean"]))]
    pairs = [f"{second} {first}" for i, first in enumerate(axes) for second in axes[: i + 1]]
    components = [str(k + 1) for k in range(len(target["component_weights"]))]
    parts += _quantity("component weights", "component_weights", report, components, width)
    parts += _quantity("mean", "mean", report, axes, width)
    parts += _quantity("covariance", "covariance", report, pairs, width)
    parts += _quantity("mean reward", "mean_reward", report, list(target["mean_reward"]), width)
    return "\n".join(parts)


_HEAD = (
    "method", "mode TV (floor)", "sliced W2 (floor)", "certificate, nats", "ESS", "log E[W]", "evaluations", "seconds",
)  # fmt: skip


def _worth_saying(row: Mapping[str, Any]) -> bool:
    # That there is no certificate shows in the table.
    return row["certificate"] is not None and row["certificate_note"] is not None


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{_number(row['mode_weight_tv'])} ({_number(row['mode_weight_tv_floor'])})",
        f"{_number(row['sliced_w2'])} ({_number(row['sliced_w2_floor'])})",
        _with_error(row["certificate"], row["certificate_se"]),
        _ABSENT if row["ess_fraction"] is None else f"{row['ess_fraction']:.1%}",
        _with_error(row["log_normalizer_estimate"], row["log_normalizer_estimate_se"]),
        f"{row['score_evaluations']:g}",
        f"{row['seconds']:.2f}",
    ]


def _quantity(title: str, key: str, report: Mapping[str, Any], names: Sequence[str], width: int) -> list[str]:
    """Return what compares one quantity of all methods with the target's."""
    rows = [["exact target", *map(_number, _flat(report["target"][key]))]]
    for name, row in report["methods"].items():
        pairs = zip(_flat(row[key]), _flat(row[f"{key}_se"]), strict=True)
        rows.append([name, *[_with_error(value, error) for value, error in pairs]])
    shown = ["", table([title, *names[:SHOWN]], [row[: 1 + SHOWN] for row in rows], width=width)]
    return shown if len(names) <= SHOWN else [*shown, f"(the first {SHOWN} of {len(names)})"]


def _flat(values: Any) -> list[float]:
    """Return the numbers of a vector, a mapping, or the lower triangle of a symmetric matrix."""
    if isinstance(values, Mapping):
        return list(values.values())
    if values and isinstance(values[0], list):
        return [value for place, row in enumerate(values) for value in row[: place + 1]]
    return list(values)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return _ABSENT
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4e}"
