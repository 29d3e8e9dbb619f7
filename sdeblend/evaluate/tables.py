"""A summary as tables, in markdown and in LaTeX: quality, cost, n, and what is not significant.

Marks: ``~`` a difference from the reference (or a win rate from one half) that is not significant; ``*`` a distance
that exact samples could have, as many as these are worth, or ``?`` if that is less than a tenth of n; ``[k of m]`` a
distance that is known of k blocks out of m; ``†`` a point of a front that another preference of the same method
dominates; ``o`` a method that has another law than the target by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sdeblend.evaluate.groups import method_of
from sdeblend.evaluate.summary import exact_reward, label

_ABSENT = "-"
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": "$<$", ">": "$>$", "±": r"$\pm$",
    "≤": r"$\le$", "†": r"$\dagger$", "`": "",
})  # fmt: skip
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: a sentence or two above it.
        header: names of the columns.
        rows: text, as many entries as the header.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table in markdown."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join([f"**{self.caption}**", "", *("| " + " | ".join(line) + " |" for line in lines)])

    def latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs."""
        columns = "l" + "r" * (len(self.header) - 1)
        body = [" & ".join(map(escaped, row)) + r" \\" for row in self.rows]
        head = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(self.caption)}}}"]
        head += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(escaped, self.header)) + r" \\"]
        return "\n".join([*head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a summary: the overviews first, then each group, then methods and their sources."""
    out = []
    groups, reference = summary["groups"], label(summary["reference"])
    for name in dict.fromkeys(name for g in groups for m in g["methods"].values() for name in m["distances"]):
        what = f"{name} to the exact target"
        if len(groups) > 1:
            out += _overviews(groups, what, _distance(name), name)
        out += _overviews(groups, f"{what}, difference from {reference} on the same blocks", _nearer(name))
    if len(groups) > 1:
        out += _overviews(groups, f"difference of r(w) from {reference}", _gain)
    out += [_front(front, groups) for front in summary["fronts"]]
    out += _claimed(groups)
    out += [_group(group, summary) for group in groups]
    out.append(_methods(summary))
    return out


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the whole report in markdown."""
    return "\n\n".join([f"# {summary['title']}", *_notes(summary), *(t.markdown() for t in tables(summary))]) + "\n"


def latex(summary: Mapping[str, Any]) -> str:
    """Return the whole report in LaTeX, the title as a comment."""
    head = f"% {' '.join(summary['title'].split())}; needs \\usepackage{{booktabs}}"
    notes = [rf"\noindent {escaped(note)}" for note in _notes(summary)]
    return "\n\n".join([head, *notes, *(table.latex() for table in tables(summary))]) + "\n"


def escaped(text: str) -> str:
    """Return text as LaTeX sets it, without the marks of code."""
    return text.translate(_LATEX)


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what stands under the title, a paragraph each."""
    notes = [
        f"± and [ ] are {summary['confidence']:.0%} intervals: of rewards by a paired bootstrap over seeds (and "
        "prompts, if several), of distances by Student's t over what the caption says. Variants that are replicates of "
        "each other are strata, unless it says that the interval is over them. Each stands for itself, uncorrected "
        "for their number.",
        "Marks: `~` not significantly different from the reference (win rate: from one half); `*` a distance that "
        "exact samples could have, as many as these are worth (n eff.), or `?` if that is less than a tenth of n, so "
        "that little can be told; `[k of m]` a distance known of k blocks out of m; `†` a point that another "
        "preference of the same method dominates; `o` a method that has another law than the target by construction.",
    ]
    if summary["note"].strip():
        notes.insert(0, " ".join(summary["note"].split()))
    rewards = summary["rewards"]
    if rewards is None:  # results of a version that did not store it
        return notes
    many = Counter(reward["name"] for reward in rewards)
    each = []
    for reward in rewards:
        where = f" on {', '.join(reward['variants'])}" if many[reward["name"]] > 1 else ""
        scale = "not scaled" if reward["scale"] == 1 else f"in units of {_short(reward['scale'])}"
        each.append(f"{reward['name']}{where} {scale} ({reward['unit']})")
    return [*notes, f"Rewards, and r(w) with them: {'; '.join(each) or 'not scaled'}."]


def _overviews(
    groups: Sequence[Mapping[str, Any]], what: str, get: Callable[[Found], Found | None], floor: str | None = None
) -> list[Table]:
    """Return one table a preference: methods by groups and strengths; all preferences in one if nothing else varies."""
    preferences = list(dict.fromkeys(tuple(group["preference"].values()) for group in groups))
    several = len({(g["group"], g["strength"]) for g in groups}) > 1
    equal = all(len(set(p)) == 1 for p in preferences)
    out = []
    for preference in [None] if not several or equal else preferences:
        own = [g for g in groups if preference is None or tuple(g["preference"].values()) == preference]
        rows = [
            (_name(name), *(_told(get(g["methods"][name]), g["methods"][name], sign=floor is None)
                            if name in g["methods"] else _ABSENT for g in own))
            for name in _order(own)
        ]  # fmt: skip
        if floor is not None:
            rows.insert(0, ("(exact samples)", *(_floor(g, floor) for g in own)))
        rows = [row for row in rows if set(row[1:]) != {_ABSENT}]
        if not rows:
            continue
        shown = "" if preference is None else f", preference {_numbers(preference)}"
        found = [get(method) for group in own for method in group["methods"].values()]
        caption = f"{what}{shown}; {_count(own)}{_over(found)}"
        out.append(Table(caption, ("method", *_columns(own)), tuple(rows)))
    return out


def _count(groups: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({g["n"] for g in groups})
    return f"n = {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'} samples a method"


def _over(found: Sequence[Found | None], of: str = "") -> str:
    """Return what the intervals of distances are over, as a caption says it."""
    kinds = sorted({one["over"] for one in found if one is not None and one.get("over")})
    return f", {of}± over {' or '.join(kinds)}" if kinds else ""


def _columns(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short name of each group: what varies among them."""
    parts: list[Callable[[Mapping[str, Any]], str]] = [
        lambda g: str(g["group"]), lambda g: f"strength {g['strength']:g}",
        lambda g: _numbers(tuple(g["preference"].values())),
    ]  # fmt: skip
    varying = [part for part in parts if len({part(g) for g in groups}) > 1] or parts[:1]
    if len({parts[0](g) for g in groups}) == len(groups):
        varying = parts[:1]
    return ["; ".join(part(g) for part in varying) for g in groups]


def _order(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group["methods"]))


def _floor(group: Mapping[str, Any], name: str) -> str:
    distances = [method["distances"].get(name, {}) for method in group["methods"].values()]
    found = [distance["floor"] for distance in distances if "floor" in distance]
    # Weighted samples have a higher one, of as many as they are worth.
    return _short(min(found)) if found else _ABSENT


def _distance(name: str) -> Callable[[Found], Found | None]:
    return lambda method: method["distances"].get(name)


def _nearer(name: str) -> Callable[[Found], Found | None]:
    return lambda method: method["distances"].get(name, {}).get("difference")


def _gain(method: Found) -> Found | None:
    return method.get("difference")


def _told(found: Found | None, method: Found, *, sign: bool = False) -> str:
    """Return an estimate with its interval and its mark, and of how many blocks it is if not of all."""
    if found is None:
        return _ABSENT
    blocks = f" [{found['cells']} of {found['of']}]" if found.get("cells") != found.get("of") else ""
    return _plus_minus(found, sign=sign) + _mark(found, method) + blocks


def _mark(found: Found, method: Found) -> str:
    if found.get("significant") is False:
        return "~"
    if found.get("above_floor") is not False:
        return ""
    return "*" if method["effective_share"] >= 0.1 else "?"


def _group(group: Mapping[str, Any], summary: Mapping[str, Any]) -> Table:
    methods: Mapping[str, Any] = group["methods"]
    rewards = list(dict.fromkeys(name for m in methods.values() for name in m["rewards"]))
    # Ten columns of rewards hide the rest; the sum is there anyway.
    rewards = rewards if len(rewards) <= 4 else []
    distances = list(dict.fromkeys(name for m in methods.values() for name in m["distances"]))
    measures = list(dict.fromkeys(name for m in methods.values() for name in m["measures"]))
    header = ("method", *rewards, "r(w)", "difference", "win rate", *distances, *measures, "certificate, nats", "ESS",
              "n eff.", "model calls", "gradients", "reward calls", "seconds")  # fmt: skip
    rows = []
    if group["target"]:
        total = exact_reward(group)
        exact = [_short(group["target"].get(reward)) for reward in rewards]
        rows.append(("(exact target)", *exact, _short(total), *[_ABSENT] * (len(header) - 2 - len(rewards))))
    for name, m in methods.items():
        rows.append(
            (
                _name(name),
                *(_plus_minus(m["rewards"][reward]) if reward in m["rewards"] else _ABSENT for reward in rewards),
                _plus_minus(m["weighted"]),
                _told(_gain(m), m, sign=True),
                _told(m.get("win_rate"), m),
                *(_with_floor(m["distances"].get(distance), m) for distance in distances),
                *(_short(m["measures"].get(measure)) for measure in measures),
                _short(m["certificate"]),
                _ABSENT if m["ess"] is None else f"{m['ess']:.0%}",
                f"{m['effective']:.0f}",
                *(_short(m[cost]) for cost in ("model_calls", "gradient_calls", "reward_calls", "seconds")),
            )
        )
    rows += [(_name(name), why, *[_ABSENT] * (len(header) - 2)) for name, why in group["absent"].items()]
    for printed in summary["published"]:
        if printed["group"] in ("", group["group"]) and printed["reward"] in rewards:
            shown = [f"{printed['value']:g}" if reward == printed["reward"] else _ABSENT for reward in rewards]
            source = f"{printed['label']} (printed, {printed['source']})"
            rows.append((source, *shown, *[_ABSENT] * (len(header) - 1 - len(rewards))))
    missing = sum(m["missing"] for m in methods.values())
    caption = (
        f"{group['group']}, preference {_numbers(tuple(group['preference'].values()))}, strength "
        f"{group['strength']:g}; n = {group['n']} samples a method in {group['blocks']} block(s), differences from "
        f"{label(summary['reference'])}, costs a sample, seconds a block"
    )
    caption += _over([found for m in methods.values() for found in m["distances"].values()], "distances ")
    caption += _scales(group)
    caption += f"; {missing} samples without a value of some reward" if missing else ""
    return Table(caption + ("; not finished" if group["incomplete"] else ""), header, tuple(rows))


def _scales(group: Mapping[str, Any]) -> str:
    """Return what rewards are divided by, as a caption says it."""
    scales = group["scales"]
    told = ", ".join(f"{name} {_short(scale)}" for name, scale in scales.items())
    return f"; rewards over their scales ({told})" if set(scales.values()) - {1} else ""


def _front(front: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Table:
    points = [_numbers(tuple(p)) for p in front["preferences"]]
    caption = (
        f"{front['group']}, strength {front['strength']:g}: mean ({', '.join(front['rewards'])}) at each preference "
        f"and hypervolume above ({', '.join(_short(v) for v in front['reference_point'])}), ratio to "
        f"{label(front['ratio_over'])}; n = {front['n']} samples a method and preference"
    ) + _scales(next(g for g in groups if g["group"] == front["group"]))
    rows = []
    for name, m in front["methods"].items():
        ratio = m["ratio"]
        mark = "" if ratio is None or _excludes(ratio, 1) or name == front["ratio_over"] else "~"
        shown = _ABSENT if ratio is None else _bracketed(ratio) + mark
        where = [
            ", ".join(_short(v) for v in point) + ("†" if dominated else "")
            for point, dominated in zip(m["points"], m["dominated"], strict=True)
        ]
        rows.append((_name(name), _bracketed(m["hypervolume"]), shown, *where))
    if front["target"]:
        exact = [", ".join(_short(v) for v in point) for point in front["target"]]
        rows.insert(0, ("(exact target)", _ABSENT, _ABSENT, *exact))
    return Table(caption, ("method", "hypervolume", "ratio", *points), tuple(rows))


def _claimed(groups: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of the claimed order, pair by pair, if one was claimed."""
    pairs = list(dict.fromkeys(_claim(p) for g in groups for p in g["order"]))
    if not pairs:
        return []
    rows = []
    for low, high, strict in pairs:
        found = [[p["difference"] for p in g["order"] if _claim(p) == (low, high, strict)] for g in groups]
        told = [_plus_minus(f[0], sign=True) + " " + _verdict(f[0], strict) if f else _ABSENT for f in found]
        rows.append((f"{label(low)} {'<' if strict else '≤'} {label(high)}", *told))
    caption = f"the claimed order of mean r(w), each pair by its paired difference; {_count(groups)}"
    return [Table(caption, ("claim", *_columns(groups)), tuple(rows))]


def _claim(pair: Mapping[str, Any]) -> tuple[str, str, bool]:
    return pair["low"], pair["high"], pair["strict"]


def _verdict(found: Found, strict: bool) -> str:
    if found["low"] is None or (strict and not found["significant"]):
        return "open"
    if not found["significant"]:
        return "holds"
    return "holds" if found["value"] > 0 else "contradicted"


def _methods(summary: Mapping[str, Any]) -> Table:
    groups = summary["groups"]
    rows = []
    for name in dict.fromkeys(name for g in groups for name in (*g["methods"], *g["absent"])):
        method = method_of(name)
        if method is not None:
            options = ", ".join(f"{key} {value}" for key, value in summary["options"].get(name, {}).items())
            rows.append((_name(name), name, options or _ABSENT, method.cost, _time(name, groups), method.source))
    return Table("methods: options other than the defaults, cost (K members with a coefficient), seconds over the "
                 f"base's (median of {len(groups)} groups) and source",
                 ("method", "name", "options", "cost", "time", "source"), tuple(rows))


def _time(method: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the seconds of a method over those of the base, the median over the groups that have both."""
    ratios = [
        g["methods"][method]["seconds"] / g["methods"]["base"]["seconds"]
        for g in groups
        if {method, "base"} <= set(g["methods"]) and g["methods"]["base"]["seconds"]
    ]
    return _short(median(ratios)) if ratios else _ABSENT


def _name(name: str) -> str:
    method = method_of(name)
    return label(name) + ("" if method is None or method.aims else " o")


def _numbers(values: Sequence[float]) -> str:
    if len(values) > 3 and len(set(values)) == 1:
        return "equal"
    return "(" + ", ".join(f"{v:.3g}" for v in values) + ")"


def _short(value: float | None) -> str:
    if value is None:
        return _ABSENT
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def _plus_minus(found: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    if found is None or found["value"] is None:
        return _ABSENT
    value = _short(found["value"])
    value = f"+{value}" if sign and found["value"] > 0 else value
    if found["low"] is None:
        return value
    return f"{value} ± {(found['high'] - found['low']) / 2:.1g}"


def _with_floor(found: Found | None, method: Found) -> str:
    floor = "" if found is None or "floor" not in found else f" ({_short(found['floor'])})"
    return _told(found, method) + floor


def _bracketed(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return _short(found["value"])
    return f"{_short(found['value'])} [{_short(found['low'])}, {_short(found['high'])}]"


def _excludes(found: Mapping[str, Any], number: float) -> bool:
    return found["low"] is not None and not found["low"] <= number <= found["high"]
