"""The check of tuned members passes, rejects its controls and draws its figure."""

from __future__ import annotations

import pytest

from proofs_checks import members
from proofs_checks.check import Settings


@pytest.mark.slow
def test_check_passes_with_power_and_draws_its_figure() -> None:
    outcome = members.check(Settings(seed=1, fast=True))
    assert [m.what for m in outcome.measurements if not m.passed] == []
    axes = members.figure(outcome).axes
    assert all(ax.get_title(loc="left") and ax.get_ylabel() and ax.get_legend() for ax in axes)
