"""The report of a run of the checks: one self-contained page, readable without the code.

No script, no font, no address outside the page: style is inline, figures and formulas are images in it. Verdicts are
words and signs, not colours alone; narrow screens get one card a measurement in place of a wide table.
"""

from __future__ import annotations

import html
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template

from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.seeds import Count, recorded
from proofs_checks.harness.statements import Statement, statements
from proofs_checks.harness.terminal import number, repeat, summary

PAGE, STYLE = (Path(__file__).with_name(f"report.{kind}") for kind in ("html", "css"))
LIBRARIES = ("sdeblend", "torch", "numpy", "scipy", "matplotlib")
HEADINGS = ("measured", "value", "bound", "margin", "control, broken on purpose", "verdict")
SUMMARY_HEADINGS = ("statement", "tightest measurement", *HEADINGS[1:])
READABLE_REM_PER_INCH = 4.2


def render(outcomes: dict[str, Outcome], settings: Settings, only: Sequence[str] = ()) -> str:
    """Return the page for the outcomes of a run, in the order of the theory.

    Args:
        outcomes: by name of the statement's module; any subset of them.
        settings: seed and size of the run.
        only: what the run was asked for; all if empty.

    Returns:
        HTML that needs no other file.

    Raises:
        ValueError: an outcome of an unknown statement.
    """
    unknown = [name for name in outcomes if name not in statements()]
    if unknown:
        raise ValueError(f"a report has the statements {', '.join(statements())}, got {', '.join(unknown)}")
    chosen = {name: (module, outcomes[name]) for name, module in statements().items() if name in outcomes}
    articles = "\n".join(_article(name, module, outcome) for name, (module, outcome) in chosen.items())
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"), banner=_banner(outcomes), run=_run(outcomes, settings, only),
        summary=_summary(chosen), articles=articles,
    )  # fmt: skip


def verdict(outcome: Outcome) -> tuple[str, str, str]:
    """Return a statement's verdict: class of its style, sign and words."""
    if not outcome.measurements:
        return "fail", "✗", "the check stopped"
    if outcome.passed:
        return "pass", "✓", "holds"
    if all(m.holds for m in outcome.measurements):
        return "weak", "!", "not tested: a control was not rejected"
    return "fail", "✗", "FAILS"


def _mark(kind: str, sign: str, words: str) -> str:
    return f'<span class="mark {kind}"><span aria-hidden="true">{sign}</span> {html.escape(words)}</span>'


def _measurement_mark(m: Measurement) -> str:
    if m.passed:
        return _mark("pass", "✓", "pass")
    return _mark("weak", "!", "no power") if m.holds else _mark("fail", "✗", "FAIL")


def _banner(outcomes: dict[str, Outcome]) -> str:
    kind, sign = ("pass", "✓") if outcomes and all(o.passed for o in outcomes.values()) else ("fail", "✗")
    hold, rest = summary(outcomes)
    return f'<p class="banner {kind}"><span aria-hidden="true">{sign}</span> <strong>{hold}</strong> {rest}.</p>'


def _run(outcomes: dict[str, Outcome], settings: Settings, only: Sequence[str]) -> str:
    before = [recorded().get(name, Count()) for name in statements()]
    least = Count(min(c.fast for c in before), min(c.full for c in before), sum(c.failed for c in before))
    facts = {
        "seed": str(settings.seed),
        "size": "fast (fewer problems and samples)" if settings.fast else "full",
        "repeat with": repeat(settings, only),
        "seeds before": f"at least {least} (sdeblend verify --seeds 0:200, and with --fast)",
        "time": f"{sum(o.seconds for o in outcomes.values()):.0f} s of computing, one thread a check",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{n} {_version(n)}" for n in LIBRARIES)]),
    }
    rows = (f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="run">{"".join(rows)}</dl>'


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return "(not installed)"


def _summary(chosen: dict[str, tuple[Statement, Outcome]]) -> str:
    rows = []
    for name, (module, outcome) in chosen.items():
        title = f'<a href="#{name}">{html.escape(module.TITLE)}</a>'
        # What did not pass comes first, then the smallest margin.
        ordered = sorted(outcome.measurements, key=lambda m: (m.passed, m.margin if m.holds else 0.0))
        cells = _cells(ordered[0]) if ordered else ["—"] * len(HEADINGS)
        rows.append([title, *cells[:-1], _mark(*verdict(outcome))])
    return _table(SUMMARY_HEADINGS, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; each cell carries its heading for screens too narrow for columns."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = ""
    for row in rows:
        pairs = zip((heading.split()[0].strip(",") for heading in headings), row, strict=True)
        body += "<tr>" + "".join(f'<td data-label="{h}"><span>{cell}</span></td>' for h, cell in pairs) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(m: Measurement) -> list[str]:
    return [
        html.escape(m.what),
        _number(m.value),
        f"{'≤' if m.relation == '<=' else '≥'} {_number(m.bound)}",
        _number(m.margin),
        f"{html.escape(m.control)}: {_number(m.control_value)}, {'rejected' if m.control_rejected else 'NOT rejected'}",
        _measurement_mark(m),
    ]


def _number(value: float) -> str:
    """Return a number for reading: 1.2e-13 as a power of ten, infinity as its sign."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isnan(value):
        return "not a number"
    mantissa, _, exponent = number(value).partition("e")
    if not exponent:
        return mantissa.replace("-", "−")
    power = f"10<sup>{int(exponent)}</sup>".replace("-", "−")
    return power if mantissa == "1" else f"{mantissa.replace('-', '−')}&nbsp;×&nbsp;{power}"


def _article(name: str, module: Statement, outcome: Outcome) -> str:
    parts = [
        f'<article id="{name}">',
        f"<h2>{html.escape(module.TITLE)}</h2>",
        f"<p>{_mark(*verdict(outcome))} Before this run: {recorded().get(name, Count())}.</p>",
        f"<p>{html.escape(module.WORDS)}</p>",
        _formula(module.FORMULA),
        _figure(module, outcome),
    ]
    if outcome.measurements:
        parts.append(_table(HEADINGS, [_cells(m) for m in outcome.measurements]))
    falsified = html.escape(module.FALSIFIED_BY.rstrip("."))
    parts.append(f"<p><strong>What would have falsified it:</strong> {falsified}.</p>")
    if outcome.findings:
        items = "".join(f"<li>{_finding(finding)}</li>" for finding in outcome.findings)
        parts.append(f"<h3>Findings</h3><ul>{items}</ul>")
    if record := getattr(module, "recorded", lambda: None)():
        words, headings, rows = record
        cells = [[html.escape(cell) for cell in row] for row in rows]
        parts.append(f"<h3>On record</h3><p>{html.escape(words)}</p>{_table(list(map(html.escape, headings)), cells)}")
    return "\n".join([*parts, "</article>"])


def _finding(text: str) -> str:
    escaped = html.escape(text)
    return f"<pre>{escaped}</pre>" if "\n" in text else escaped


def _formula(text: str) -> str:
    from proofs_checks.harness.figures import formula

    images = []
    for line in text.strip().splitlines():
        address, width = formula(line)
        images.append(f'<img src="{address}" alt="{html.escape(line.strip())}" style="width:{width:.2f}in">')
    return f'<div class="formula">{"".join(images)}</div>'


def _figure(module: Statement, outcome: Outcome) -> str:
    from proofs_checks.harness.figures import image

    if not outcome.measurements:
        return ""
    try:
        picture = module.figure(outcome)
        address = image(picture)
    except Exception as error:  # a figure must not cost the numbers of a whole run
        reason = html.escape(f"{type(error).__name__}: {error}")
        return f"<p>{_mark('fail', '✗', 'the figure could not be drawn')} {reason}</p>"
    words = f"Figure: {html.escape(module.TITLE)}; its numbers are in the table"
    # On a narrow screen a figure scrolls; it never gets smaller than can be read.
    least = READABLE_REM_PER_INCH * picture.get_figwidth()
    return f'<figure><img src="{address}" alt="{words}" style="min-width:{least:.0f}rem"></figure>'
