"""The report: self-contained, complete, well-formed, and honest about what did not pass."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser

import pytest

from proofs_checks import closed_forms
from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.report import render
from proofs_checks.harness.runner import as_json

SETTINGS = Settings(seed=3, fast=True)
VOID = {"meta", "img", "br"}


@lru_cache(None)
def outcome() -> Outcome:
    return closed_forms.check(SETTINGS)


def page(**outcomes: Outcome) -> str:
    return render(outcomes, SETTINGS)


def tampered(**changes: float | str) -> Outcome:
    first, *others = outcome().measurements
    return replace(outcome(), measurements=[replace(first, **changes), *others])  # type: ignore[arg-type]


class Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_self_contained_and_small() -> None:
    text = page(closed_forms=outcome())
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text and "url(" not in text and "@import" not in text
    assert len(text) < 1_000_000
    assert len(parser.images) == 2 and all(image["alt"] for image in parser.images)
    said = (closed_forms.TITLE, "What would have falsified it", "seeds before", "torch", "1 of 1 statements hold")
    for words in said:
        assert words in text


def test_page_is_the_same_for_the_same_outcome() -> None:
    assert page(closed_forms=outcome()) == page(closed_forms=outcome())


def test_what_violates_its_bound_shows_as_a_failure() -> None:
    good, bad = page(closed_forms=outcome()), page(closed_forms=tampered(value=1.0))
    assert "FAIL" not in good
    assert "✗</span> FAIL<" in bad and "✗</span> FAILS<" in bad and "0 of 1 statements hold" in bad


def test_what_is_not_a_number_shows_as_a_failure() -> None:
    assert "not a number" in page(closed_forms=tampered(value=math.nan))


def test_a_control_that_passes_shows_as_a_lack_of_power() -> None:
    text = page(closed_forms=tampered(control_value=0.0))
    assert "NOT rejected" in text and "no power" in text and "0 of 1 statements hold" in text


def test_a_check_that_stopped_and_a_figure_that_cannot_be_drawn_are_told() -> None:
    stopped = Outcome([], findings=["the check stopped: Traceback\n  <module> in toy"])
    text = page(closed_forms=stopped)
    assert "✗</span> the check stopped" in text and "&lt;module&gt;" in text and "0 of 1" in text
    assert "the figure could not be drawn" in page(closed_forms=replace(outcome(), data={}))


def test_text_is_escaped() -> None:
    hostile = Measurement("<b>a & b</b>", 0.5, "<=", 1.0, "<i>off</i>", 2.0)
    text = page(closed_forms=replace(outcome(), measurements=[hostile], findings=["<script>alert(1)</script>"]))
    assert "<b>" not in text and "<i>" not in text and "<script" not in text
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text


def test_subsets_are_in_the_order_of_the_theory_and_unknown_names_refused() -> None:
    text = page(lemma_1=Outcome([]), closed_forms=Outcome([]))
    assert text.index('<article id="closed_forms"') < text.index('<article id="lemma_1"')
    assert "0 of 0 statements hold" in page()
    with pytest.raises(ValueError, match="got lemma_9"):
        page(lemma_9=outcome())


def test_json_round_trip() -> None:
    written = as_json({"closed_forms": outcome()}, SETTINGS)
    read = json.loads(json.dumps(written, allow_nan=False))
    assert read == written
    assert read["statements"]["closed_forms"]["passed"] is True
    assert len(read["statements"]["closed_forms"]["measurements"]) == len(outcome().measurements)
