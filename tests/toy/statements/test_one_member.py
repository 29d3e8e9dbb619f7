"""One member a step on mixtures: what a draw adds to a step, what it adds to a run, and how errors are measured."""

from __future__ import annotations

import pytest
import torch

from sdeblend import BackwardSDE, Blend, VPLinear, solve, time_grid
from sdeblend.shell.figures import encoded
from toy import MixtureStack, problems
from toy.plotting.one_member import batches_figure, one_step_figure, sequence_figure
from toy.statements.one_member import OneStep, covariance_error, extra_variance, one_step

SCHEDULE, WEIGHTS = VPLinear(), torch.tensor([0.6, 0.4], dtype=torch.float64)
PROBLEM = problems.ring8(kl_weight=0.25)
MEMBERS, TARGET = PROBLEM.members(), PROBLEM.target([0.6, 0.4])
COPIES = 20_000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(h: float, count: int = COPIES) -> OneStep:
    point = torch.tensor([1.2, 0.0])
    return one_step(MEMBERS, WEIGHTS, TARGET, SCHEDULE, point, 0.3, h, count=count, generator=generator(0))


def test_one_step_has_the_blends_mean_and_the_predicted_covariance() -> None:
    taken = step(0.2)
    covariance = torch.cov(taken.points.T)
    # entries of a covariance of n Gaussian copies have a standard error of at most sqrt(2/n) times its size
    tolerance = 5 * (2 / COPIES) ** 0.5 * float(taken.covariance.diagonal().max())
    assert float(taken.points.mean(0).norm()) < 5 * float(covariance.trace() / COPIES) ** 0.5
    assert float((covariance - taken.covariance).abs().max()) < tolerance
    # control: the blend's own covariance, without the extra term
    assert float((covariance - torch.eye(2, dtype=torch.float64)).abs().max()) > 3 * tolerance


def test_one_steps_extra_variance_is_of_order_h_against_its_own() -> None:
    # the noise of the step falls like h, what the draw adds like h^2
    extra = [float(step(h, count=2).covariance.trace()) - 2 for h in (0.2, 0.1)]
    assert extra[0] / extra[1] == pytest.approx(2, rel=1e-9)


def test_one_steps_members_balance_about_the_blend() -> None:
    taken = step(0.05, count=100)
    assert float((WEIGHTS @ taken.member_means).abs().max()) < 1e-12
    assert float(taken.exact_mean.norm()) > 0.01  # the control is not the blend
    assert set(taken.member.tolist()) == {0, 1}


def test_extra_variance_adds_up_to_the_log_weights() -> None:
    blend, grid = Blend(MixtureStack(MEMBERS, SCHEDULE), WEIGHTS), time_grid(SCHEDULE, 30)
    start = SCHEDULE.prior((200, 2), generator=generator(1), dtype=torch.float64)
    added = extra_variance(blend, SCHEDULE, start, grid, generator=generator(2))
    solution = solve(BackwardSDE(SCHEDULE, blend), start, grid, noise=generator(2), correct="certify")
    assert solution.log_weights is not None
    expected = -float(solution.log_weights.mean())  # -2 E[log W] / d
    assert float(added.value.sum()) == pytest.approx(expected, rel=1e-10)
    assert len(added.value) == 29  # the last step takes no noise
    other = extra_variance(Blend(MixtureStack(MEMBERS, SCHEDULE), WEIGHTS.flip(0)), SCHEDULE, start, grid,
                           generator=generator(2))  # fmt: skip
    assert float(other.value.sum()) != pytest.approx(expected, rel=1e-3)


def test_covariance_error_takes_out_the_noise_that_is_shared() -> None:
    x = torch.randn(4000, 2, generator=generator(3), dtype=torch.float64)
    same, wider = covariance_error(x, x), covariance_error(1.1 * x, x)
    assert float(same.value) == 0
    assert float(wider.value) == pytest.approx(0.21 * 2**0.5, abs=5 * float(wider.se))
    apart = covariance_error(1.1 * x, torch.randn(4000, 2, generator=generator(4), dtype=torch.float64))
    assert float(wider.se) < float(apart.se) / 3


def test_figures_name_the_control_and_the_target() -> None:
    indices = {"systematic": torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int16)}
    shares = {"mpa": torch.full((1, 8), 0.1), "ls": torch.full((3, 8), 0.2)}
    figures = {
        "control: step of the exact target's score": one_step_figure([step(0.1, 200), step(0.05, 200)], ["a", "b"]),
        "the blend: exactly w a step": sequence_figure(indices, 0.5),
        "exact target": batches_figure(shares, TARGET.weights, [(0, "right"), (2, "up")], 0.01),
    }
    for text, figure in figures.items():
        assert encoded(figure, dpi=40).startswith(b"\x89PNG")
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
        assert text in [entry.get_text() for legend in legends if legend is not None for entry in legend.get_texts()]
