"""The checks that sample or solve: they pass on the library as it is, and fail on one that was tampered with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from proofs_checks import certificate, corrector, feynman_kac, fokker_planck, levels, proposition_2, solvers
from proofs_checks.harness.chains import line_nodes, member_means, normal_density, transition
from proofs_checks.harness.check import Settings, slope
from proofs_checks.harness.draw import draw_line, draw_space
from proofs_checks.harness.statements import statement
from sdeblend import Corrector, Evaluation, VPLinear, time_grid
from sdeblend.correct import Weights
from sdeblend.steps import Ancestral, EulerMaruyama, StepCoefficients
from toy import GaussianMixture
from toy.statements.fokker_planck import Density

FAST = Settings(seed=1, fast=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fokker_planck", "proposition_2", "feynman_kac", "certificate", "levels", "solvers"])
def test_check_passes_with_power_and_draws_its_figure(name: str) -> None:
    outcome = statement(name).check(FAST)
    assert [m.what for m in outcome.measurements if not m.passed] == []
    assert outcome.findings
    axes = statement(name).figure(outcome).axes
    assert all(ax.get_title(loc="left") and ax.get_ylabel() and ax.get_legend() for ax in axes)


@pytest.mark.rng_untouched
def test_same_seed_same_numbers() -> None:
    first, second, other = (feynman_kac._discrete(Settings(seed, True)) for seed in (3, 3, 4))
    assert first == second != other


def test_equation_of_the_weights_rejects_another_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert feynman_kac._equation(FAST)[0] < 1e-10
    right = Evaluation.spread
    monkeypatch.setattr(Evaluation, "spread", lambda self: 1.001 * right(self))
    assert feynman_kac._equation(FAST)[0] > 1e-6


def test_discrete_weights_reject_a_variance_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert feynman_kac._discrete(FAST)[0] < 1e-9
    _tamper_with_variance(monkeypatch, 1.001)
    assert feynman_kac._discrete(FAST)[0] > 1e-4


def test_path_divergence_rejects_a_certificate_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate._path(FAST, 0)
    assert abs(path.sampled - path.path) < 5 * path.error
    assert path.divergence < path.path
    _tamper_with_variance(monkeypatch, 1.1)
    path = certificate._path(FAST, 0)
    assert abs(path.sampled - path.path) > 5 * path.error


def test_curves_reject_weights_that_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    line = levels._line(FAST, 1)
    assert max(line.off, line.part) < 5 and max(line.ratios) < 1
    _tamper_with_variance(monkeypatch, 1.1)
    assert levels._line(FAST, 1).off > 5


def test_moves_reject_another_score_and_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    still = corrector._still(FAST, 0)
    assert still.biases[-1] < 0.01 < min(still.wrong[-1], still.renoised)
    assert slope(corrector.KAPPAS, still.biases) > 0.8
    chain = corrector._chain(corrector._line2(), FAST, None)
    assert abs(chain.sampled - chain.path) < 5 * chain.error and chain.weighted < 0.02 < chain.alone < chain.plain
    monkeypatch.setattr(corrector, "Corrector", lambda moves, kappa: Corrector(moves, 0.8 * kappa))
    chain = corrector._chain(corrector._line2(), FAST, None)
    assert abs(chain.sampled - chain.path) > 5 * chain.error


def _tamper_with_variance(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = Weights.add
    monkeypatch.setattr(Weights, "add", lambda self, spread, variance, t: right(self, spread, factor * variance, t))


def test_certificate_of_a_quarter_of_the_spread_is_below_the_true_divergence_somewhere() -> None:
    lines = [certificate._line(FAST, i) for i in range(2)]
    assert all(line.divergence < line.certificate for line in lines)
    assert all(line.variation < math.sqrt(line.certificate / 2) for line in lines)
    assert any(line.divergence > line.quartered for line in lines)


def test_a_divergence_taken_the_other_way_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(i: int) -> certificate._Line:
        return certificate._line(FAST, i)

    right = line(0)
    assert right.divergence == pytest.approx(right.again, rel=1e-4)
    monkeypatch.setattr(Density, "kl_to", Density.kl_from)
    assert line(0).divergence != pytest.approx(right.again, rel=1e-3)
    monkeypatch.undo()
    way = certificate.divergence
    monkeypatch.setattr(certificate, "divergence", lambda p, q, dx: way(q, p, dx))
    path = certificate._path(FAST, 0)
    assert path.divergence != pytest.approx(path.again, rel=1e-3)


def test_one_step_rejects_another_weight_of_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EulerMaruyama.coefficients

    def doubled(self: EulerMaruyama, schedule: VPLinear, grid: torch.Tensor) -> StepCoefficients:
        k = right(self, schedule, grid)
        return replace(k, b=1.001 * k.b)

    assert proposition_2._one_step(FAST)[0] < 1e-10
    monkeypatch.setattr(EulerMaruyama, "coefficients", doubled)
    assert proposition_2._one_step(FAST)[0] > 1e-4


def test_rates_are_those_of_their_kind() -> None:
    steps = (50, 100, 200)
    drawn = proposition_2._draw_rational(FAST, 0)
    table = proposition_2.line_distances(drawn, torch.Generator().manual_seed(0), 24, steps)
    slopes = {name: -slope(steps, row) for name, row in table.items()}
    assert abs(slopes["independent"] - 1) < 0.15
    assert abs(slopes["systematic"] - 1) < 0.15
    assert slopes["shared"] < 0.75
    assert abs(slopes["wrong"]) < 0.2


def test_euler_path_rejects_a_step_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EulerMaruyama.coefficients

    def louder(self: EulerMaruyama, schedule: VPLinear, grid: torch.Tensor) -> StepCoefficients:
        k = right(self, schedule, grid)
        return replace(k, g=1.0001 * k.g)

    assert solvers._euler_path(FAST)[0] < 1e-9
    monkeypatch.setattr(EulerMaruyama, "coefficients", louder)
    assert solvers._euler_path(FAST)[0] > 1e-6


def test_samples_follow_the_equation_only_with_enough_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fokker_planck._samples(FAST, 0)
    assert max(run.blend, run.exact) < fokker_planck.KOLMOGOROV < min(run.weights_off, run.exact_off)
    monkeypatch.setattr(fokker_planck, "ExponentialMultistep", Ancestral)
    monkeypatch.setattr(fokker_planck, "STEPS", 20)
    run = fokker_planck._samples(FAST, 0)
    assert min(run.blend, run.exact) > fokker_planck.KOLMOGOROV


def test_kolmogorov_statistic_against_scipy() -> None:
    from scipy.stats import kstest, norm

    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    samples = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = math.sqrt(500) * kstest(samples.flatten().numpy(), norm.cdf).statistic
    assert fokker_planck._distance(samples, x, normal_density(x)) == pytest.approx(expected, rel=1e-4)


def test_line2_is_the_reference() -> None:
    divergence, below = fokker_planck._line2(0.25, 0.5)
    assert divergence == pytest.approx(0.27, rel=0.02)
    assert below == pytest.approx(fokker_planck.BELOW_ZERO, abs=1e-3)


def test_chain_laws_are_those_of_the_linear_recursion() -> None:
    schedule, law = VPLinear(t_min=0.05), GaussianMixture([1.0], [[0.7]], [0.3])
    moves = EulerMaruyama().plan(schedule, time_grid(schedule, 30, to_zero=False))
    nodes = line_nodes(moves)
    density, mean, variance = normal_density(nodes), 0.0, 1.0
    for move in moves:
        density = transition(nodes, member_means([law], schedule, move, nodes)[0], move.g**2) @ density
        alpha, noise = float(schedule.alpha(move.t)), float(schedule.sigma(move.t)) ** 2
        pull = move.b / (0.3 * alpha**2 + noise)
        mean, variance = (move.a - pull) * mean + pull * 0.7 * alpha, (move.a - pull) ** 2 * variance + move.g**2
    dx = float(nodes[1] - nodes[0])
    assert float(density.sum()) * dx == pytest.approx(1, abs=1e-6)
    assert float(density @ nodes) * dx == pytest.approx(mean, abs=1e-6)
    assert float(density @ (nodes - mean) ** 2) * dx == pytest.approx(variance, abs=1e-6)


def test_drawn_problems_have_coefficients_that_sum_to_one_and_a_target() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for drawn in (draw_line(generator, (0.2, 1.0), 1.3), draw_space(generator, 3, 1.4)):
            assert float(drawn.coefficients.sum()) == pytest.approx(1)
            assert float(drawn.coefficients[0]) < 0
            assert math.isfinite(drawn.log_normalizer)
            assert len(drawn.laws) == len(drawn.coefficients)
