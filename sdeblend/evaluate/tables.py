"""A summary as tables, in markdown and in LaTeX: quality, cost, n, and what is not significant.

Marks: ``~`` a difference from the reference (or a win rate from one half) that is not significant; ``*`` a distance
that exact samples could have, as many as these are worth, or ``?`` if that is less than a tenth of n; ``[k of m]`` a
distance that is known of k blocks out of m; ``†`` a point of a front that another preference of the same method
dominates; ``o`` a method that has another law than the target by construction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from sdeblend.evaluate.results import DistanceResult, Estimate, Front, GroupResult, Interval, MethodResult, Summary
from sdeblend.methods.registry import label, method_of
from sdeblend.shell.console import markdown as markdown_table

_ABSENT: Final = "-"
_LATEX: Final = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": "$<$", ">": "$>$", "±": r"$\pm$",
    "≤": r"$\le$", "†": r"$\dagger$", "`": "",
})  # fmt: skip
Get = Callable[[MethodResult], Estimate | None]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: a sentence or two above it.
        header: names of the columns.
        rows: text, as many entries as the header; what lacks at the end of one is filled with "-".
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        whole = tuple(row + (_ABSENT,) * (len(self.header) - len(row)) for row in self.rows)
        object.__setattr__(self, "rows", whole)

    def markdown(self) -> str:
        """Return the table in markdown."""
        return f"**{self.caption}**\n\n{markdown_table(self.header, self.rows)}"

    def latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs."""
        columns = "l" + "r" * (len(self.header) - 1)
        head, *body = (" & ".join(map(escaped, row)) + r" \\" for row in (self.header, *self.rows))
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{escaped(self.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head,
            r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ])  # fmt: skip


def escaped(text: str) -> str:
    """Return text as LaTeX sets it, without the marks of code."""
    return text.translate(_LATEX)


def markdown(summary: Summary) -> str:
    """Return the whole report in markdown."""
    return "\n\n".join([f"# {summary.title}", *_notes(summary), *(t.markdown() for t in tables(summary))]) + "\n"


def latex(summary: Summary) -> str:
    """Return the whole report in LaTeX, the title as a comment."""
    head = f"% {' '.join(summary.title.split())}; needs \\usepackage{{booktabs}}"
    notes = [rf"\noindent {escaped(note)}" for note in _notes(summary)]
    return "\n\n".join([head, *notes, *(table.latex() for table in tables(summary))]) + "\n"


def tables(summary: Summary) -> list[Table]:
    """Return the tables of a summary: the overviews first, then each group, then methods and their sources."""
    groups, reference, out = summary.groups, label(summary.reference), []
    for name in dict.fromkeys(name for g in groups for m in g.methods.values() for name in m.distances):
        what = f"{name} to the exact target"
        if len(groups) > 1:
            out += _overviews(groups, what, _distance(name), floor=name)
        out += _overviews(groups, f"{what}, difference from {reference} on the same blocks", _nearer(name))
    if len(groups) > 1:
        out += _overviews(groups, f"difference of r(w) from {reference}", lambda m: m.difference)
    out += [_front(front, groups) for front in summary.fronts]
    out += _claimed(groups)
    return [*out, *(_group(group, summary) for group in groups), _methods(summary)]


def _notes(summary: Summary) -> list[str]:
    """Return what stands under the title, a paragraph each."""
    notes = [
        f"± and [ ] are {summary.confidence:.0%} intervals: of rewards by a paired bootstrap over seeds (and "
        "prompts, if several), of distances by Student's t over what the caption says. Variants that are replicates of "
        "each other are strata, unless it says that the interval is over them. Each stands for itself, uncorrected "
        "for their number.",
        "Marks: `~` not significantly different from the reference (win rate: from one half); `*` a distance that "
        "exact samples could have, as many as these are worth (n eff.), or `?` if that is less than a tenth of n, so "
        "that little can be told; `[k of m]` a distance known of k blocks out of m; `†` a point that another "
        "preference of the same method dominates; `o` a method that has another law than the target by construction.",
    ]
    if summary.note.strip():
        notes.insert(0, " ".join(summary.note.split()))
    if summary.rewards is None:  # results of a version that did not store it
        return notes
    many = Counter(reward.name for reward in summary.rewards)
    each = []
    for reward in summary.rewards:
        where = f" on {', '.join(reward.variants)}" if many[reward.name] > 1 else ""
        scale = "not scaled" if reward.scale == 1 else f"in units of {_short(reward.scale)}"
        each.append(f"{reward.name}{where} {scale} ({reward.unit})")
    return [*notes, f"Rewards, and r(w) with them: {'; '.join(each) or 'not scaled'}."]


def _overviews(groups: Sequence[GroupResult], what: str, get: Get, floor: str | None = None) -> list[Table]:
    """Return one table a preference: methods by groups and strengths; all preferences in one if nothing else varies."""
    preferences = list(dict.fromkeys(group.weights for group in groups))
    several = len({(g.group, g.strength) for g in groups}) > 1
    equal = all(len(set(weights)) == 1 for weights in preferences)
    out = []
    for weights in [None] if not several or equal else preferences:
        own = [g for g in groups if weights is None or g.weights == weights]
        rows = [
            (_name(name), *(_shown(g.methods.get(name), get, sign=floor is None) for g in own))
            for name in dict.fromkeys(name for group in own for name in group.methods)
        ]
        if floor is not None:
            rows.insert(0, ("(exact samples)", *(_floor(g, floor) for g in own)))
        rows = [row for row in rows if set(row[1:]) != {_ABSENT}]
        if rows:
            shown = "" if weights is None else f", preference {_numbers(weights)}"
            over = _over(get(method) for group in own for method in group.methods.values())
            out.append(Table(f"{what}{shown}; {_count(own)}{over}", ("method", *_columns(own)), tuple(rows)))
    return out


def _count(groups: Sequence[GroupResult]) -> str:
    sizes = sorted({g.n for g in groups})
    return f"n = {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'} samples a method"


def _over(found: Iterable[Estimate | None], of: str = "") -> str:
    """Return what the intervals of distances are over, as a caption says it."""
    kinds = sorted({one.over for one in found if one is not None and one.over})
    return f", {of}± over {' or '.join(kinds)}" if kinds else ""


def _columns(groups: Sequence[GroupResult]) -> list[str]:
    """Return a short name of each group: what varies among them."""
    parts = [(g.group, f"strength {g.strength:g}", _numbers(g.weights)) for g in groups]
    varying = [place for place in range(3) if len({part[place] for part in parts}) > 1] or [0]
    if len({name for name, _, _ in parts}) == len(groups):
        varying = [0]
    return ["; ".join(part[place] for place in varying) for part in parts]


def _floor(group: GroupResult, name: str) -> str:
    floors = [d.floor for m in group.methods.values() if (d := m.distances.get(name)) and d.floor is not None]
    # Weighted samples have a higher one, of as many as they are worth.
    return _short(min(floors, default=None))


def _group(group: GroupResult, summary: Summary) -> Table:
    methods = group.methods
    rewards = list(dict.fromkeys(name for m in methods.values() for name in m.rewards))
    # Ten columns of rewards hide the rest; the sum is there anyway.
    rewards = rewards if len(rewards) <= 4 else []
    distances = list(dict.fromkeys(name for m in methods.values() for name in m.distances))
    measures = list(dict.fromkeys(name for m in methods.values() for name in m.measures))
    header = ("method", *rewards, "r(w)", "difference", "win rate", *distances, *measures, "certificate, nats", "ESS",
              "n eff.", "model calls", "gradients", "reward calls", "seconds")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    if group.target:
        exact = [_short(group.target.get(reward)) for reward in rewards]
        rows.append(("(exact target)", *exact, _short(group.exact_reward())))
    for name, m in methods.items():
        rows.append(
            (
                _name(name),
                *(_plus_minus(m.rewards.get(reward)) for reward in rewards),
                _plus_minus(m.weighted),
                _shown(m, lambda m: m.difference, sign=True),
                _shown(m, lambda m: m.win_rate),
                *(_shown(m, _distance(distance), floor=True) for distance in distances),
                *(_short(m.measures.get(measure)) for measure in measures),
                _short(m.certificate),
                _ABSENT if m.ess is None else f"{m.ess:.0%}",
                f"{m.effective:.0f}",
                *map(_short, (m.model_calls, m.gradient_calls, m.reward_calls, m.seconds)),
            )
        )
    rows += [(_name(name), why) for name, why in group.absent.items()]
    for printed in summary.published:
        if printed.group in ("", group.group) and printed.reward in rewards:
            shown = [f"{printed.value:g}" if reward == printed.reward else _ABSENT for reward in rewards]
            rows.append((f"{printed.label} (printed, {printed.source})", *shown))
    missing = sum(m.missing for m in methods.values())
    caption = (
        f"{group.group}, preference {_numbers(group.weights)}, strength {group.strength:g}; n = {group.n} samples "
        f"a method in {group.blocks} block(s), differences from {label(summary.reference)}, costs a sample, seconds a "
        "block"
    )
    caption += _over([found for m in methods.values() for found in m.distances.values()], "distances ")
    caption += _scales(group)
    caption += f"; {missing} samples without a value of some reward" if missing else ""
    return Table(caption + ("; not finished" if group.incomplete else ""), header, tuple(rows))


def _scales(group: GroupResult) -> str:
    """Return what rewards are divided by, as a caption says it."""
    each = ", ".join(f"{name} {_short(scale)}" for name, scale in group.scales.items())
    return f"; rewards over their scales ({each})" if set(group.scales.values()) - {1} else ""


def _front(front: Front, groups: Sequence[GroupResult]) -> Table:
    caption = (
        f"{front.group}, strength {front.strength:g}: mean ({', '.join(front.rewards)}) at each preference "
        f"and hypervolume above ({_point(front.reference_point)}), ratio to {label(front.ratio_over)}; n = {front.n} "
        "samples a method and preference"
    ) + _scales(next(g for g in groups if g.group == front.group))
    rows: list[tuple[str, ...]] = []
    if front.target:
        rows.append(("(exact target)", _ABSENT, _ABSENT, *map(_point, front.target)))
    for name, m in front.methods.items():
        same = m.ratio is not None and name != front.ratio_over and not m.ratio.excludes(1)
        points = zip(m.points, m.inside, strict=True)
        rows.append(
            (
                _name(name), _bracketed(m.hypervolume), _bracketed(m.ratio) + ("~" if same else ""),
                *(_point(point) + ("†" if dominated else "") for point, dominated in points),
            )
        )  # fmt: skip
    header = ("method", "hypervolume", "ratio", *(_numbers(weights) for weights in front.preferences))
    return Table(caption, header, tuple(rows))


def _claimed(groups: Sequence[GroupResult]) -> list[Table]:
    """Return a table of the claimed order, pair by pair, if one was claimed."""
    rows = []
    for low, high, strict in dict.fromkeys(claim.pair for g in groups for claim in g.order):
        found = [next((claim for claim in g.order if claim.pair == (low, high, strict)), None) for g in groups]
        shown = [f"{_plus_minus(c.difference, sign=True)} {c.verdict}" if c else _ABSENT for c in found]
        rows.append((f"{label(low)} {'<' if strict else '≤'} {label(high)}", *shown))
    caption = f"the claimed order of mean r(w), each pair by its paired difference; {_count(groups)}"
    return [Table(caption, ("claim", *_columns(groups)), tuple(rows))] if rows else []


def _methods(summary: Summary) -> Table:
    groups, rows = summary.groups, []
    for name in dict.fromkeys(name for g in groups for name in (*g.methods, *g.absent)):
        method = method_of(name)
        if method is not None:
            options = "not stored"
            if summary.options is not None:
                options = ", ".join(f"{key} {value}" for key, value in summary.options.get(name, {}).items())
            rows.append((_name(name), name, options or _ABSENT, method.cost, _time(name, groups), method.source))
    return Table("methods: options other than the defaults, cost (K members with a coefficient), seconds over the "
                 f"base's (median of {len(groups)} groups) and source",
                 ("method", "name", "options", "cost", "time", "source"), tuple(rows))  # fmt: skip


def _time(name: str, groups: Sequence[GroupResult]) -> str:
    """Return the seconds of a method over those of the base, the median over the groups that have both."""
    both = [(g.methods[name].seconds, g.methods["base"].seconds) for g in groups if {name, "base"} <= set(g.methods)]
    ratios = [own / base for own, base in both if base]
    return _short(median(ratios)) if ratios else _ABSENT


def _name(name: str) -> str:
    method = method_of(name)
    return label(name) + ("" if method is None or method.aims else " o")


def _distance(name: str) -> Get:
    return lambda method: method.distances.get(name)


def _nearer(name: str) -> Get:
    return lambda method: found.difference if (found := method.distances.get(name)) else None


def _shown(method: MethodResult | None, get: Get, *, sign: bool = False, floor: bool = False) -> str:
    """Return an estimate with its interval and its mark, of how many blocks if not of all, and its floor if asked."""
    found = None if method is None else get(method)
    if method is None or found is None:
        return _ABSENT
    above = found.above_floor if isinstance(found, DistanceResult) else None
    mark = "~" if found.significant is False else ""
    if found.significant is None and above is False:
        mark = "*" if method.effective_share >= 0.1 else "?"
    blocks = f" [{found.cells} of {found.of}]" if found.cells != found.of else ""
    exact = found.floor if floor and isinstance(found, DistanceResult) else None
    return _plus_minus(found, sign=sign) + mark + blocks + ("" if exact is None else f" ({_short(exact)})")


def _numbers(values: Sequence[float]) -> str:
    if len(values) > 3 and len(set(values)) == 1:
        return "equal"
    return "(" + ", ".join(f"{v:.3g}" for v in values) + ")"


def _point(values: Sequence[float]) -> str:
    return ", ".join(map(_short, values))


def _short(value: float | None) -> str:
    if value is None or math.isnan(value):
        return _ABSENT
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def _plus_minus(found: Interval | None, *, sign: bool = False) -> str:
    if found is None or math.isnan(found.value):
        return _ABSENT
    value = f"{'+' if sign and found.value > 0 else ''}{_short(found.value)}"
    return value if math.isnan(found.low) else f"{value} ± {(found.high - found.low) / 2:.1g}"


def _bracketed(found: Interval | None) -> str:
    if found is None:
        return _ABSENT
    ends = "" if math.isnan(found.low) else f" [{_short(found.low)}, {_short(found.high)}]"
    return _short(found.value) + ends
