"""The checks that need no sampling theory: they pass on fixed seeds, draw figures, and notice what is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from proofs_checks import closed_forms, lemma_1, lemma_2, limits, proposition_1, remark_2
from proofs_checks.harness import draw, quadrature
from proofs_checks.harness.check import Differences, Outcome, Settings
from proofs_checks.harness.statements import statement
from sdeblend import Blend, Preference, VPLinear
from toy import GaussianMixture, control, jensen_gap
from toy.statements.bounds import JensenBounds, jensen_bounds

NAMES = ("closed_forms", "proposition_1", "lemma_1", "remark_2", "lemma_2", "limits")


class Tiny(Settings):
    """One problem of each kind, as many samples as in fast mode."""

    def choose(self, fast: int, full: int) -> int:
        return fast if fast > 1000 else 1


@pytest.mark.rng_untouched
@pytest.mark.parametrize("name", NAMES)
def test_check_passes_on_problems_that_differ_and_draws_a_figure(name: str) -> None:
    outcomes = [statement(name).check(Settings(seed=seed, fast=True)) for seed in (0, 1)]
    assert [m.what for outcome in outcomes for m in outcome.measurements if not m.passed] == []
    values = [[m.value for m in outcome.measurements] for outcome in outcomes]
    assert values[0] and values[0] != values[1]
    words = []
    for axes in statement(name).figure(outcomes[0]).axes:
        assert axes.get_title(loc="left") and axes.get_xlabel() and axes.get_legend() is not None
        words += [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("exact" in word for word in words)


def failing(check: Callable[[Settings], Outcome], seed: int = 0) -> set[str]:
    return {m.what.split(",")[0].split(":")[0] for m in check(Tiny(seed=seed)).measurements if not m.holds}


def test_a_wrong_noised_law_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GaussianMixture.noised
    wrong = lambda self, schedule, t: right(self, schedule, 0.999 * torch.as_tensor(t))  # noqa: E731
    monkeypatch.setattr(GaussianMixture, "noised", wrong)
    assert {"noised density", "noised score"} <= failing(closed_forms.check)


def test_a_wrong_normaliser_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GaussianMixture.log_normalizer
    wrong = lambda self, reward, *, kl_weight: right(self, reward, kl_weight=kl_weight) + 1e-6  # noqa: E731
    monkeypatch.setattr(GaussianMixture, "log_normalizer", wrong)
    assert {"log normaliser", "tilt in 3 to 6 dimensions"} <= failing(closed_forms.check)
    assert {"scalar identity", "objective below its optimum by alpha KL"} <= failing(proposition_1.check)


def test_a_wrong_control_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposition_1, "control", lambda *given: 1.0001 * control(*given))
    assert failing(proposition_1.check) == {"control as a covariance"}


def test_bounds_that_are_off_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(*factors: float) -> Callable[..., JensenBounds]:
        def bounds(*given: Any) -> JensenBounds:
            found = jensen_bounds(*given)
            values = (found.cauchy_schwarz, found.shift, found.thermodynamic)
            return JensenBounds(*(factor * value for factor, value in zip(factors, values, strict=True)))

        return bounds

    integrals = "bounds less the integrals they stand for"
    monkeypatch.setattr(lemma_1, "jensen_bounds", scaled(0.2, 0.2, 0.99))
    assert failing(lemma_1.check) == {"largest gap over B1", "largest gap over B2", "largest gap over B3", integrals}
    for factors in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):  # too large to be violated
        monkeypatch.setattr(lemma_1, "jensen_bounds", scaled(*factors))
        assert failing(lemma_1.check) == {integrals}


def test_a_gap_of_another_order_or_size_near_the_data_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    slope, leading = ["t to 0", " slope of log gap over log s²"][0], "gap at t = 0.0001 less its leading term"
    monkeypatch.setattr(lemma_1, "jensen_gap", lambda *given: 1.03 * jensen_gap(*given))
    assert failing(lemma_1.check) == {"gap as a covariance", "gap as a gradient", leading, "largest gap over B3"}
    monkeypatch.setattr(lemma_1, "jensen_gap", control)
    assert {slope, leading} <= failing(lemma_1.check)


def test_what_is_followed_towards_the_data_has_a_leading_term() -> None:
    # A reward that is nearly straight has next to none, and then its slope says nothing.
    for seed in range(40):
        slope, *_ = lemma_1._near_data(1, torch.Generator().manual_seed(seed))
        assert abs(slope - 1) < 0.1


def test_a_gap_of_first_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remark_2, "jensen_gap", control)
    assert "weak tilts" in failing(remark_2.check)


@pytest.mark.parametrize("module", [lemma_2, limits])
def test_a_blend_that_is_a_little_off_is_noticed(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    class Off(Blend):
        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().__call__(x, t) * (1 + 1e-8)

    monkeypatch.setattr(module, "Blend", Off)
    names = {"preference (strength 1)", "preference and strength", "same in 3 to 6 dimensions"}
    names = names if module is lemma_2 else {"Gaussian", "strength 0 is the base", "strength 1 is the member"}
    assert failing(module.check) == names


def test_samples_of_another_strength_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = limits._sample

    def off(laws: Any, preference: Any, count: int, generator: torch.Generator) -> torch.Tensor:
        return right(laws, Preference(preference.weights, preference.strength * 0.8 + 0.1), count, generator)

    monkeypatch.setattr(limits, "_sample", off)
    failed = {m.what.split(":")[0] for m in limits.check(Tiny(seed=0)).measurements if not m.holds}
    assert failed == {"samples of a Gaussian's blend", "samples at strength 0 and 1"}


def test_lattice_agrees_with_itself_at_half_the_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = draw.draw_problem(generator, dim=2)
    x = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
    schedule, values = VPLinear(), []
    least = schedule.time_of_log_snr(draw.LOG_SNR[1])
    for spacing in (0.08, 0.04, 0.4):
        monkeypatch.setitem(quadrature.SPACING, 2, spacing)
        lattice = quadrature.Lattice(problem)
        log_joint = lattice.log_base + lattice.log_kernel(x, schedule.alpha(least), schedule.sigma(least))
        values.append(float(lattice.log_integral(log_joint + lattice.rewards[0] / problem.kl_weight)))
    assert abs(values[0] - values[1]) < 1e-12
    assert abs(values[2] - values[1]) > 1e-6  # control: too coarse


def test_a_difference_that_is_no_number_fails() -> None:
    differences = Differences({"a": "control", "b": "control"})
    differences.add("a", float("nan"), 1.0)
    differences.add("a", 0.0, 1.0)
    assert [m.passed for m in differences.measurements()] == [False, False]  # b was never measured
