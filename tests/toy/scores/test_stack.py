"""The fused scores are those of the plain closed form: every kernel, dtype, memory layout, time and subset."""

import copy
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import SCHEDULES, BackwardSDE, Blend, CountingStack, ScoreStack, VPLinear, solve, time_grid
from tests.support.strategies import SCHEDULE, close, generator, mixtures, points, refuses, seeds, times
from toy import GaussianMixture, MixtureStack, QuadraticReward, mixture_score, problems
from toy.scores.kernels import Eigen, Features, Rows


def plain(laws, x, t, schedule=SCHEDULE):
    return torch.stack([law.noised(schedule, t).score(x) for law in laws])


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@st.composite
def stacks(draw):
    """Draw a base and one to three other laws: tilts by linear or quadratic rewards, or unrelated mixtures."""
    base = draw(mixtures())
    laws, g = [base], generator(draw(seeds))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["linear", "quadratic", "other"]))
        b = torch.randn(base.dim, generator=g, dtype=torch.float64)
        q = torch.eye(base.dim) * 0.7 if kind == "quadratic" else None
        other = kind == "other"
        laws.append(draw(mixtures(base.dim)) if other else base.tilt(QuadraticReward(b, q), kl_weight=0.5))
    return laws


@given(stacks(), times, seeds, st.integers(1, 40))
def test_equals_the_closed_form_in_float64(laws, t, seed, count):
    x = points(laws[0], t, count, seed)
    close(MixtureStack(laws, SCHEDULE)(x, torch.tensor(t, dtype=torch.float64)), plain(laws, x, t), 1e-10)


@given(stacks(), times, seeds, st.integers(1, 40))
def test_equals_the_closed_form_in_float32(laws, t, seed, count):
    x = points(laws[0], t, count, seed).float()
    scores = MixtureStack(laws, SCHEDULE)(x, t)
    assert scores.dtype == torch.float32
    close(scores.double(), plain(laws, x, t), 2e-5, scale=1)


def full_mixture(dim, components, seed=0, offset=0.0, isotropic=False):
    g = generator(seed)
    weights = 0.2 + torch.rand(components, generator=g, dtype=torch.float64)
    means = 1.5 * torch.randn(components, dim, generator=g, dtype=torch.float64) + offset
    root = torch.randn(components, dim, dim, generator=g, dtype=torch.float64) / math.sqrt(dim)
    covariances = 0.2 * root @ root.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    if isotropic:
        covariances = 0.05 + torch.rand(components, generator=g, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def with_tilts(base, seed=1):
    g = generator(seed)
    rewards = [QuadraticReward(torch.randn(base.dim, generator=g, dtype=torch.float64)) for _ in range(2)]
    # The quadratic one is about the mean of the base, wherever that is.
    bowl = torch.eye(base.dim, dtype=torch.float64) * 0.5
    return [
        base,
        *(base.tilt(reward, kl_weight=0.5) for reward in rewards),
        base.tilt(QuadraticReward(bowl @ base.mean, bowl), kl_weight=0.5),
    ]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    ("dim", "isotropic", "count"), [(2, False, 300), (5, False, 300), (20, False, 5), (20, False, 300), (20, True, 300)]
)
def test_kernels_offsets_and_subsets(dim, isotropic, count, offset):
    laws = with_tilts(full_mixture(dim, 5, offset=offset, isotropic=isotropic))
    stack = MixtureStack(laws, SCHEDULE)
    for t in (1e-3, 0.2, 1.0):
        x = (
            points(laws[0], t, count, 2)
            if offset == 0
            else laws[0].noised(SCHEDULE, t).sample(count, generator=generator(2))
        )
        expected = plain(laws, x, t)
        assert relative(stack(x, t), expected) < 1e-10
        assert relative(stack(x, t, [2, 0]), expected[[2, 0]]) < 1e-10
        assert relative(stack(x, t, (3,)), expected[[3]]) < 1e-10
        x32 = x.float()
        assert relative(stack(x32, t).double(), plain(laws, x32, t)) < 2e-5
    kernels = {type(kernel) for (_, _, _), (kernel, *_) in stack._recent.items()}
    expected_kernel = Eigen if count < dim else Features if dim <= 12 or isotropic else Rows
    assert expected_kernel in kernels or (isotropic and kernels <= {Features, Rows, Eigen})


def test_uncentred_float32_would_be_wrong():
    # The control of the offset test: float32 products of coordinates near 1000 keep no digit of the score.
    law = full_mixture(2, 5, offset=1000.0).noised(SCHEDULE, 0.01)
    x = law.sample(100, generator=generator(0)).float()
    precision = torch.linalg.inv(law.covariances).float()
    pull = (precision @ law.means.float().unsqueeze(-1)).squeeze(-1)
    pushes = torch.einsum("kij,nj->nki", precision, x)
    logits = -0.5 * torch.einsum("nki,ni->nk", pushes, x) + x @ pull.T - 0.5 * (pull * law.means.float()).sum(-1)
    shares = (logits + law.log_weights.float() - law.eigenvalues.log().sum(-1).float() / 2).softmax(-1)
    naive = torch.einsum("nk,nki->ni", shares, pull - pushes)
    assert relative(naive.double(), law.score(x)) > 0.01


@pytest.mark.parametrize(("dim", "isotropic"), [(2, False), (2, True), (20, False)])
def test_memory_layouts_and_batches_agree(dim, isotropic):
    stack = MixtureStack(with_tilts(full_mixture(dim, 4, isotropic=isotropic)), SCHEDULE)
    x = points(stack.mixtures[0], 0.3, 70_000 if dim == 2 else 2_500, 3).float()
    rows = stack(x, 0.3)
    channels = stack(x.T.contiguous().T, 0.3)
    assert rows.shape == channels.shape == (4, *x.shape)
    assert relative(channels, rows) < 1e-6
    halves = torch.cat([stack(x[: len(x) // 3], 0.3), stack(x[len(x) // 3 :], 0.3)], 1)
    assert relative(halves, rows) < 1e-5
    assert relative(stack(x[::2], 0.3), rows[:, ::2]) < 1e-5
    before = x.clone()
    first = stack(x, 0.3).clone()
    stack(x + 1, 0.3)
    assert torch.equal(first, stack(x, 0.3)) and torch.equal(x, before)


def test_what_a_call_returned_is_not_overwritten_by_the_next():
    stack = MixtureStack([full_mixture(2, 3)], SCHEDULE)
    x = torch.randn(10, 2, generator=generator(0))
    first = stack(x, 0.3)
    kept = first.clone()
    stack(x + 1, 0.3)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dim", [2, 20])
def test_preparing_a_grid_changes_nothing(dim):
    laws = with_tilts(full_mixture(dim, 3))
    grid = time_grid(SCHEDULE, 12)
    prepared, fresh = MixtureStack(laws, SCHEDULE), MixtureStack(laws, SCHEDULE)
    prepared.prepare(grid)
    x = points(laws[0], 0.5, 30, 0)
    for t in grid:
        for active in (None, [1], [0, 2]):
            close(prepared(x, t, active), fresh(x, t, active), 1e-13)
        close(prepared(x.float(), t), fresh(x.float(), t), 1e-5)
    assert bool(prepared._prepared) == (dim == 2)
    close(prepared(x, 0.123), plain(laws, x, 0.123))


def test_extreme_points_stay_finite():
    stack = MixtureStack(with_tilts(full_mixture(2, 6)), SCHEDULE)
    x = torch.tensor([[1e4, -1e4], [0.0, 0.0], [-300.0, 2.0]])
    scores = stack(x, 1e-3)
    assert bool(scores.isfinite().all())
    close(scores.double(), plain(stack.mixtures, x, 1e-3), 1e-5)


def test_members_of_different_size():
    laws = [full_mixture(3, 2), full_mixture(3, 7, 1), full_mixture(3, 1, 2)]
    x = points(laws[0], 0.3, 50, 0)
    close(MixtureStack(laws, SCHEDULE)(x, 0.3), plain(laws, x, 0.3))
    laws = [full_mixture(30, 2), full_mixture(30, 7, 1), full_mixture(30, 1, 2)]
    x = points(laws[0], 0.3, 50, 0)
    close(MixtureStack(laws, SCHEDULE)(x, 0.3), plain(laws, x, 0.3))
    close(MixtureStack(laws, SCHEDULE)(x[:3], 0.3), plain(laws, x[:3], 0.3))


def test_a_gradient_goes_through():
    laws = with_tilts(full_mixture(2, 4))
    x = points(laws[0], 0.3, 5, 0).requires_grad_()
    scores = MixtureStack(laws, SCHEDULE)(x, 0.3)
    (slope,) = torch.autograd.grad(scores[1, :, 0].sum(), x)
    eps = 1e-6
    moved = x.detach() + torch.tensor([eps, 0.0])
    difference = (plain(laws, moved, 0.3) - plain(laws, x.detach(), 0.3))[1, :, 0] / eps
    assert relative(slope[:, 0], difference) < 1e-4
    with torch.no_grad():
        close(MixtureStack(laws, SCHEDULE)(x, 0.3), scores.detach(), 1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule(name):
    schedule = SCHEDULES[name]()
    laws = with_tilts(full_mixture(2, 4))
    stack = MixtureStack(laws, schedule)
    for t in (0.0, schedule.t_min, (schedule.t_min * schedule.t_max) ** 0.5, schedule.t_max):
        x = laws[0].noised(schedule, t).sample(20, generator=generator(0))
        close(stack(x, t), plain(laws, x, t, schedule), 1e-10)


def test_threads_do_not_share_buffers():
    stack = MixtureStack([full_mixture(2, 8)], SCHEDULE)
    batches = [points(stack.mixtures[0], 0.3, 5_000, seed) for seed in range(4)]
    expected = [stack(x, 0.3).clone() for x in batches]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(stack(batches[i], 0.3), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_is_a_score_stack_that_blends():
    problem = problems.ring8()
    stack = problem.stack(SCHEDULE)
    assert isinstance(stack, ScoreStack) and len(stack) == 3
    x = points(problem.base, 0.4, 6, 0)
    close(mixture_score(problem.base, SCHEDULE)(x, torch.tensor(0.5)), stack(x, 0.5)[0])
    counting = CountingStack(stack)
    blend = Blend(counting, torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64))
    scores = plain([problem.member("right"), problem.member("up")], x, 0.4)
    close(blend(x, torch.tensor(0.4, dtype=torch.float64)), 0.3 * scores[0] + 0.7 * scores[1])
    assert counting.evaluations == 2 * len(x)
    close(copy.deepcopy(stack)(x, 0.4), stack(x, 0.4))


@pytest.mark.rng_untouched
def test_a_run_with_the_exact_score_gives_the_law():
    problem = problems.ring8()
    target = problem.target([0.5, 0.5])
    g = generator(0)
    n = 4000
    grid = time_grid(SCHEDULE, 150)
    run = solve(
        BackwardSDE(SCHEDULE, mixture_score(target, SCHEDULE)), SCHEDULE.prior((n, 2), generator=g), grid, noise=g
    )
    z = (run.samples.double().mean(0) - target.mean) / (target.covariance.diagonal() / n).sqrt()
    assert float(z.abs().max()) < 5
    # The control: the same samples are not those of the base.
    z = (run.samples.double().mean(0) - problem.base.mean) / (problem.base.covariance.diagonal() / n).sqrt()
    assert float(z.abs().max()) > 5


STACK: Any = MixtureStack
PLANE = MixtureStack([full_mixture(2, 2)], SCHEDULE)


@pytest.mark.parametrize(
    ("call", "parts", "kind"),
    [
        (lambda: MixtureStack([], SCHEDULE), ["at least one"], ValueError),
        (lambda: MixtureStack([full_mixture(2, 2), full_mixture(3, 2)], SCHEDULE), ["2 and 3"], ValueError),
        (lambda: STACK([1], SCHEDULE), ["int at 0"], TypeError),
        (lambda: STACK([full_mixture(2, 2)], None), ["NoiseSchedule"], TypeError),
        (lambda: PLANE(torch.zeros(3), 0.5), ["(B, 2)", "(3,)"], ValueError),
        (lambda: PLANE(torch.zeros(3, 3), 0.5), ["(3, 3)"], ValueError),
        (lambda: PLANE(torch.zeros(3, 2, dtype=torch.float16), 0.5), ["float16"], TypeError),
        (lambda: PLANE(torch.zeros(3, 2, dtype=torch.bfloat16), 0.5), ["bfloat16"], TypeError),
        (lambda: PLANE(torch.zeros(3, 2), 1.5), ["times", "1.5"], ValueError),
        (lambda: PLANE(torch.zeros(3, 2), -0.1), ["times"], ValueError),
        (lambda: PLANE.prepare([0.5, 2.0]), ["times", "2"], ValueError),
        (lambda: PLANE(torch.zeros(3, 2), 0.5, [1]), ["0 to 0", "[1]"], ValueError),
        (lambda: PLANE(torch.zeros(3, 2), 0.5, []), ["[]"], ValueError),
        (lambda: PLANE(torch.zeros(3, 2, requires_grad=True), 0.5, [-1]), ["[-1]"], ValueError),
    ],
)
def test_refuses(call, parts, kind):
    refuses(call, *parts, kind=kind)


def test_schedules_differ():
    x = torch.ones(2, 2, dtype=torch.float64)
    other = MixtureStack(PLANE.mixtures, VPLinear(beta_max=10.0))
    assert relative(PLANE(x, 0.5), other(x, 0.5)) > 0.01
