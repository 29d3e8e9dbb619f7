"""What is told of stored results, on results that are written by hand: which numbers, of how many, beside what."""

import hashlib
import json

import numpy as np
import pytest
from scipy import stats

from sdeblend.evaluate import figures
from sdeblend.evaluate.plan import Report
from sdeblend.evaluate.results import GroupResult, Summary, Variant, number
from sdeblend.evaluate.store import CellRecord, Folder, Manifest, Row, load
from sdeblend.evaluate.summary import summarise
from sdeblend.evaluate.tables import Table, latex, markdown, tables
from sdeblend.preference import Preference
from sdeblend.shell.settings import parse
from tests.support.strategies import refuses

COUNT = 8
REPORT = {"reference": "mpa", "resamples": 100, "confidence": 0.95, "hypervolume_reference": []}
EQUAL = {"a": 0.5, "b": 0.5}


def rewards(mean, seed=0, scatter=1.0):
    return np.asarray(mean, dtype=float) + scatter * np.random.default_rng(seed).normal(size=(COUNT, 2))


def cell(method, values, first=0, **said):
    """Return a cell whose samples have these rewards (n, 2)."""
    return {
        "method": method, "variant": "v", "prompt": "", "weights": EQUAL, "strength": 1.0, "first_seed": first,
        "count": len(values), "values": values, "distances": {}, **said,
    }  # fmt: skip


def store(path, cells, options=None, variants=None, report=None, **said):
    folder = Folder(path)
    variants = variants or [Variant("v", ("a", "b"))]
    fixed = {"kind": "mixture", "seed": 0, "methods": list({c["method"]: 0 for c in cells})}
    fixed |= {f"options.{name}": (options or {}).get(name, {}) for name in fixed["methods"]}
    manifest = Manifest(
        format=1, title="by hand", fixed=fixed, variants=tuple(variants), prompts=("",),
        report=Report(**REPORT | (report or {})), **said,
    )  # fmt: skip
    folder.open(manifest, resume=False)
    for index, one in enumerate(cells):
        what = {key: value for key, value in one.items() if key != "values"}
        record = CellRecord(index=index, model_calls=1.0, seconds=1.0, **what)
        rows = [
            Row(method=one["method"], variant=one["variant"], preference=one["weights"], strength=one["strength"],
                prompt=one["prompt"], seed=seed, ancestor=seed, log_weight=0.0,
                rewards={"a": number(a), "b": number(b)},
                weighted=number(one["weights"]["a"] * a + one["weights"]["b"] * b),
                model_calls=1.0, gradient_calls=0.0, reward_calls=0.0)
            for seed, (a, b) in enumerate(one["values"].tolist(), start=one["first_seed"])
        ]  # fmt: skip
        text = "".join([record.written(), *(row.written() for row in rows), json.dumps(fixed)])
        folder.write(f"{index}-{one['method']}-{hashlib.sha256(text.encode()).hexdigest()}", record, rows)
    return folder


def told(*folders):
    (stored,) = load(folders)
    return summarise(stored)


def table(summary, *parts):
    (found,) = [t for t in tables(summary) if all(part in t.caption for part in parts)]
    return found


def blocks(method, distances, **said):
    return [
        cell(method, rewards([0, 0], seed), seed * COUNT, distances=found, **said)
        for seed, found in enumerate(distances)
    ]


@pytest.mark.parametrize("lacks", [{}, {"W1": [None, None, None]}])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_distance_is_that_of_the_cells_that_have_it(tmp_path, lacks, where):
    known = [{"W1": [0.2, 0.1, 0.01]}, {"W1": [0.4, 0.1, 0.01]}]
    some = [*known[:where], lacks, *known[where:]]
    cells = [*blocks("mpa", [known[0]] * 3), *blocks("code", some), *blocks("base", [lacks] * 3)]
    summary = told(store(tmp_path, cells))
    methods = summary.groups[0].methods
    found = methods["code"].distances["W1"]
    assert (found.cells, found.of, found.value) == (2, 3, pytest.approx(0.3))
    assert (found.difference.cells, found.difference.value) == (2, pytest.approx(0.1))
    assert (methods["mpa"].distances["W1"].cells, methods["mpa"].distances["W1"].of) == (3, 3)
    assert "0.3 ± 1 [2 of 3]" in markdown(summary) and "[3 of 3]" not in markdown(summary)
    assert "W1" not in methods["base"].distances or np.isnan(methods["base"].distances["W1"].value)
    assert figures.figures(summary)


def test_distances_differ_from_the_references_block_by_block(tmp_path):
    rng = np.random.default_rng(3)
    easy = rng.uniform(0.2, 1.0, 6)
    gap = 0.1 + 0.02 * rng.normal(size=6)
    cells = blocks("mpa", [{"W1": [v, 0.1, 0.01]} for v in easy])
    cells += blocks("code", [{"W1": [v, 0.1, 0.01]} for v in easy + gap])
    cells += blocks("base", [{"W1": [v, 0.1, 0.01]} for v in easy + rng.normal(size=6)])
    summary = told(store(tmp_path, cells))
    mpa, code, base = (summary.groups[0].methods[name].distances["W1"] for name in ("mpa", "code", "base"))
    expected = stats.ttest_1samp(gap, 0).confidence_interval(0.95)
    found = code.difference
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.significant and not base.difference.significant  # the second differs by chance
    # By themselves the two intervals overlap: blocks differ by more than the methods.
    assert code.low < mpa.high
    parts = ("W1", "difference from DB-MPA on the same blocks", f"n = {6 * COUNT} samples", "± over blocks")
    shown = table(summary, *parts)
    assert [row[0] for row in shown.rows] == ["CoDe o", "base o"]
    assert not shown.rows[0][1].endswith("~") and shown.rows[1][1].endswith("~")


def test_intervals_of_distances_say_what_they_are_over(tmp_path):
    three = [Variant(name, ("a", "b"), group="draws") for name in "xyz"]

    def over(path, per_variant):
        cells = [
            one for place, variant in enumerate(three)
            for one in blocks("mpa", [{"W1": [place + 0.01 * k, 0.1, 0.01]} for k in range(per_variant)],
                              variant=variant.name)
        ]  # fmt: skip
        summary = told(store(tmp_path / path, cells, variants=three))
        return summary.groups[0].methods["mpa"].distances["W1"], table(summary, "draws, preference").caption

    within, caption = over("two", 2)
    assert within.high - within.low < 0.1 and "distances ± over blocks within variants" in caption
    between, caption = over("one", 1)
    assert between.high - between.low > 3 and "distances ± over variants" in caption


def test_a_method_with_other_options_has_another_name(tmp_path):
    few = store(tmp_path / "two", [cell("mpa", rewards([0, 0])), cell("code", rewards([1, 1], 1))],
                options={"code": {"candidates": 2, "block": 5}})  # fmt: skip
    many = store(tmp_path / "three", [cell("mpa", rewards([0, 0])), cell("code", rewards([3, 3], 1))],
                 options={"code": {"candidates": 3, "block": 5}})  # fmt: skip
    # Both folders hold the same samples of DB-MPA, and stored it under one key.
    for kind in ("cells", "rows"):
        (double,) = (many.path / kind).glob("0-mpa*")
        (first,) = (few.path / kind).glob("0-mpa*")
        double.rename(double.with_name(first.name))
    summary = told(few, many)
    (group,) = summary.groups
    assert group.n == COUNT and list(group.methods) == ["mpa", "code", "code (candidates 3)"]
    means = [method.weighted.value for method in group.methods.values()]
    assert means == pytest.approx([rewards([0, 0]).mean(), rewards([1, 1], 1).mean(), rewards([3, 3], 1).mean()])
    listed = {row[0]: row[2] for row in table(summary, "methods: options").rows}
    assert listed == {"DB-MPA": "-", "CoDe o": "candidates 2", "CoDe (candidates 3) o": "candidates 3"}


def test_folders_with_other_blocks_or_a_sample_twice_are_refused(tmp_path):
    whole = store(tmp_path / "whole", blocks("mpa", [{}, {}]))
    for count, first, got in ((4, 0, "0 to 7 beside 0 to 3"), (8, 4, "4 to 11 beside 0 to 7")):
        other = store(tmp_path / f"other-{first}", [cell("code", rewards([0, 0])[:count], first)])
        for folders in ((whole, other), (other, whole)):
            refuses(lambda folders=folders: load(folders), "blocks of seeds", got, "compare them apart")
    later = store(tmp_path / "later", [cell("mpa", rewards([0, 0], 2), 2 * COUNT)])
    assert told(whole, later).groups[0].n == 3 * COUNT
    again = store(tmp_path / "again", [cell("mpa", rewards([9, 9]))])
    refuses(lambda: load([whole, again]), "one row a seed", "'mpa' twice or in part")
    part = store(tmp_path / "part", [cell("mpa", rewards([0, 0])[:5]) | {"count": COUNT}])
    refuses(lambda: load([part]), "one row a seed", "seeds 0 to 7")


def test_other_prompts_are_another_configuration(tmp_path):
    folders = [store(tmp_path / "one", blocks("mpa", [{}])), store(tmp_path / "two", blocks("code", [{}]))]
    assert len(load(folders)) == 1
    manifest = json.loads(folders[1].manifest_file.read_text())
    folders[1].manifest_file.write_text(json.dumps(manifest | {"prompts": ["a ring"]}))
    assert len(load(folders)) == 2


def test_a_claim_may_allow_equality(tmp_path):
    low, high = rewards([0, 0]), rewards([9, 9], 1)
    # The second model is the first but for rounding, to the last sample in the same direction.
    cells = [cell("base", low), cell("mpa", high), cell("exact", high - 1e-7), cell("soup", low - 3)]

    def verdicts(*order):
        summary = told(store(tmp_path / str(len(list(tmp_path.iterdir()))), cells, report={"order": list(order)}))
        claims = table(summary, "the claimed order", f"n = {COUNT} samples a method")
        assert "n = 8 samples" in latex(summary)
        return {row[0]: row[1].split()[-1] for row in claims.rows}

    assert verdicts("base", "mpa", "<= exact", "<= soup") == {
        "base < DB-MPA": "holds",
        "DB-MPA ≤ MORL (tuned for r(w))": "holds",
        "MORL (tuned for r(w)) ≤ rewarded soup": "contradicted",
    }
    assert verdicts("mpa", "exact") == {"DB-MPA < MORL (tuned for r(w))": "open"}
    # Over a method without results a pair is strict if one of its steps is.
    assert list(verdicts("base", "code", "<= mpa", "<= pairwise", "<= exact")) == [
        "base < DB-MPA", "DB-MPA ≤ MORL (tuned for r(w))",
    ]  # fmt: skip


def test_a_method_without_a_single_value_is_told(tmp_path):
    nothing = np.full((COUNT, 2), np.nan)
    cells = [cell("mpa", rewards([0, 0])), cell("exact", nothing)]
    summary = told(store(tmp_path, cells, report={"order": ["mpa", "<= exact"]}))
    exact = summary.groups[0].methods["exact"]
    assert np.isnan(exact.weighted.value) and exact.missing == COUNT
    assert table(summary, "the claimed order").rows[0][1] == "- open"
    assert f"{COUNT} samples without a value" in markdown(summary) and figures.figures(summary)


def test_the_report_table_is_checked():
    def settings(**table):
        report = parse(Report, table, file="c.toml", section="[report]")
        report.check(("mpa", "base", "exact"))
        return report

    assert settings(order=["base", "mpa", "<= exact"]).order == ("base", "mpa", "<= exact")
    assert (settings().reference, settings().note) == ("", "")
    for order in (["<= base", "mpa"], ["base", "<=mpa"], ["base", "<= base"], ["base", "<= code"], ["<= base"]):
        refuses(lambda order=order: settings(order=order), "[report] order must name two or more of mpa, base, exact")
    refuses(lambda: settings(note=3), "c.toml: [report] note must be a string, got 3")
    refuses(lambda: settings(reference="code"), "reference must be one of mpa, base, exact")
    refuses(lambda: settings(hypervolume_over="code"), "hypervolume_over must be one of")
    refuses(lambda: settings(confidence=0.2), "c.toml: [report] confidence must be", "at least 0.5 and below 1")


def test_a_note_and_the_scales_of_rewards_are_told(tmp_path):
    scales = [
        {"name": "a", "scale": 0.25, "unit": "kB", "variants": ["v"]},
        {"name": "b", "scale": 1.0, "unit": "nats", "variants": ["v"]},
    ]
    cells = [cell("mpa", rewards([0, 0])), cell("mpa", rewards([0, 0]), weights={"a": 1.0, "b": 0.0})]
    summary = told(store(tmp_path / "told", cells, report={"note": "printed at\n100 steps"}, rewards=scales))
    for text in (markdown(summary), latex(summary)):
        assert text.index("printed at 100 steps") < text.index("intervals: of rewards")
        assert "a in units of 0.25 (kB); b not scaled (nats)." in text
    assert markdown(summary).splitlines()[2] == "printed at 100 steps"
    for parts in (("v, preference (0.5, 0.5)",), ("hypervolume",)):
        assert "rewards over their scales (a 0.25, b 1)" in table(summary, *parts).caption
    plain = told(store(tmp_path / "plain", cells, rewards=[]))
    assert "not scaled." in markdown(plain) and "scales" not in table(plain, "v, preference (0.5, 0.5)").caption
    # Results of before say nothing of it.
    old = markdown(told(store(tmp_path / "old", cells)))
    assert "scale" not in old and "by hand" in old


def test_dominated_points_are_marked_and_lie_beside_the_line(tmp_path):
    means = {(1.0, 0.0): [9, 0], (0.5, 0.5): [3, 3], (0.25, 0.75): [5, 5], (0.0, 1.0): [0, 9]}
    cells = [
        cell("mpa", rewards(mean, k, 0.1), weights={"a": w[0], "b": w[1]}) for k, (w, mean) in enumerate(means.items())
    ]
    summary = told(store(tmp_path, cells))
    (front,) = summary.fronts
    found = front.methods["mpa"]
    assert found.dominated == [False, True, False, False]
    assert [end.endswith("†") for end in table(summary, "hypervolume").rows[0][3:]] == found.dominated
    for point, interval in zip(found.points, found.intervals, strict=True):
        assert all(one.low < value < one.high for value, one in zip(point, interval, strict=True))
    style = {"mpa": {"color": "black", "linestyle": "-", "marker": "o"}}
    (axes,) = figures._pareto([front], style).axes
    line, beside = axes.lines[:2]
    assert line.get_linestyle() == "-" and line.get_xdata() == pytest.approx(sorted(line.get_xdata()))
    assert len(line.get_xdata()) == 3 and beside.get_linestyle() == "None"
    assert beside.get_xdata() == pytest.approx([found.points[1][0]])
    bars = axes.containers[0]
    assert bars.has_xerr and bars.has_yerr
    across = bars[2][0].get_segments()
    assert across[2][:, 0] == pytest.approx([getattr(found.intervals[2][0], end) for end in ("low", "high")])


def test_every_number_that_varies_has_its_figures(tmp_path):
    variants = [Variant(f"k{k}", ("a", "b"), {"kl_weight": k}) for k in (0.1, 0.5, 1.0)]
    cells = [
        cell("mpa", rewards([k, s]), variant=f"k{k}", strength=s, distances={"W1": [0.5, 0.1, 0.01]})
        for k in (0.1, 0.5, 1.0) for s in (1.0, 2.0)
    ]  # fmt: skip
    summary = told(store(tmp_path, cells, variants=variants))
    assert list(figures.figures(summary)) == [
        f"{what}-by-{axis}" for axis in ("strength", "kl_weight") for what in ("w1", "reward")
    ]
    style = {"mpa": {"color": "black", "linestyle": "-", "marker": "o"}}
    figure = figures._curves(summary, "strength", ["kl_weight"], style, "mean r(w)", lambda m: m.weighted)
    # A panel each: what is not on the axis is not averaged over.
    assert [axes.get_title() for axes in figure.axes] == [f"equal weights, kl weight {k:g}" for k in (0.1, 0.5, 1.0)]
    for axes, k in zip(figure.axes, (0.1, 0.5, 1.0), strict=True):
        assert axes.lines[0].get_xdata() == pytest.approx([1, 2])
        assert axes.lines[0].get_ydata() == pytest.approx([rewards([k, s]).mean() for s in (1.0, 2.0)])


def test_the_exact_targets_reward_is_drawn_where_it_is_known():
    weights = {"a": 0.25, "b": 0.75, "c": 0.0}
    groups = [
        GroupResult(
            group="v", values={}, preference=Preference(weights, s), n=0, blocks=0, incomplete=False, methods={},
            absent={}, target=target, order=[],
        )
        for s, target in ((1.0, {"a": 1.0, "b": 2.0}), (2.0, {"a": 3.0}), (3.0, {"a": 5.0, "b": 1.0}))
    ]  # fmt: skip
    assert [group.exact_reward() for group in groups] == [1.75, None, 2.0]
    summary = Summary(
        title="by hand", note="", confidence=0.95, reference="mpa", groups=groups, fronts=[], published=[]
    )
    figure = figures._curves(summary, "strength", [], {}, "r(w)", lambda m: None, GroupResult.exact_reward)
    [line] = figure.axes[0].lines
    assert line.get_label() == "exact target"
    assert list(line.get_xdata()) == [1, 3] and list(line.get_ydata()) == [1.75, 2.0]


def test_latex_is_escaped():
    text = Table(r"a < b > c ≤ 50 % of {x_1} \ $2 # ~ ^ | ± † `d` & e", ("h",), (("1 & 2",),)).latex()
    assert text.splitlines()[2] == (
        r"\caption{a $<$ b $>$ c $\le$ 50 \% of \{x\_1\} \textbackslash{} \$2 \# \textasciitilde{} \textasciicircum{} "
        r"\textbar{} $\pm$ $\dagger$ d \& e}"
    )
    assert r"1 \& 2 \\" in text
