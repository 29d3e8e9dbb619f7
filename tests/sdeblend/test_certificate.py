"""The certificate: the weights' identity step by step, and the path-space KL divergence computed on its own."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import (
    STEPS,
    BackwardSDE,
    Blend,
    Certificate,
    Correction,
    CountingStack,
    Preference,
    Stack,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from tests.support.chains import KINDS, Chain, gaussian_kl, log_increments, log_mass, moments, quadratic_form
from tests.support.core import Z, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.problems import line2
from toy.scores.stack import MixtureStack

SCHEDULE = VPLinear()
PLANE = [
    GaussianMixture([0.5, 0.5], [[-1.5, 0.0], [1.5, 0.5]], [0.3, 0.2]),
    GaussianMixture([0.8, 0.2], [[-1.0, 0.0], [1.0, 0.0]], [0.5, 0.4]),
    GaussianMixture([0.3, 0.3, 0.4], [[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], [0.2, 0.3, 0.4]),
]
MIXTURES = {"inside": (0.2, 0.5, 0.3), "beyond": (-0.5, 0.9, 0.6), "without": (0.6, 0.0, 0.4)}


def mixture_chain(kind, grid, mixture):
    return Chain(kind, SCHEDULE, grid.tolist(), lambda x, t: mixture.noised(SCHEDULE, t).score(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", list(MIXTURES.values()), ids=list(MIXTURES))
def test_each_step_adds_the_spread_of_the_members_means(kind, c):
    grid = time_grid(SCHEDULE, 8, "log-snr")
    blend = Blend(MixtureStack(PLANE, SCHEDULE), torch.tensor(c, dtype=torch.float64))
    x = SCHEDULE.prior((40, 2), generator=seeded(1), dtype=torch.float64)
    run = trajectory(BackwardSDE(SCHEDULE, blend), x, grid, noise=seeded(2), step=STEPS[kind](), correct="certify")
    states = list(run)
    chains = [mixture_chain(kind, grid, mixture) for mixture in PLANE]
    got = torch.stack([state.log_weights for state in states]).diff(dim=0)
    expected = torch.stack(log_increments(chains, c, [state.x for state in states[:-1]]))
    torch.testing.assert_close(got[:-1], expected, rtol=1e-8, atol=1e-10)
    assert float(got[-1].abs().max()) == 0  # the step to 0 has no noise and no weight
    assert float((got[:-1] + expected).abs().max()) > 0.01  # the other sign is told apart


@pytest.mark.parametrize("kind", KINDS)
def test_members_as_images_and_coefficients_by_sample(kind):
    grid, rows = time_grid(SCHEDULE, 5), torch.tensor([[0.5, 0.5], [1.5, -0.5], [0.0, 1.0]], dtype=torch.float64)
    functions = [lambda x, t: -x, lambda x, t: -torch.tanh(x) - x * t]
    x = torch.randn(3, 2, 4, 4, generator=seeded(1), dtype=torch.float64)
    sde = BackwardSDE(SCHEDULE, Blend(functions, rows))
    states = list(trajectory(sde, x, grid, noise=seeded(2), step=STEPS[kind](), correct="certify"))
    chains = [Chain(kind, SCHEDULE, grid.tolist(), function) for function in functions]
    for i, c in enumerate(rows.tolist()):
        expected = torch.stack(log_increments(chains, c, [state.x[i : i + 1] for state in states[:-1]])).sum()
        assert float(states[-1].log_weights[i]) == pytest.approx(float(expected), rel=1e-8, abs=1e-10)


LINE = ((0.9, 0.3), (-1.2, 0.3), (0.2, 1.2))  # mean and variance of three Gaussians


def gaussian_chain(kind, grid, mean, variance):
    def score(x, t):
        a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        return -(x - a * mean) / (a * a * variance + s * s)

    return Chain(kind, SCHEDULE, grid.tolist(), score)


def blended(chains, c):
    def score(x, t):
        return torch.stack([w * chain.score(x, t) for w, chain in zip(c, chains, strict=True)]).sum(0)

    return Chain(chains[0].kind, SCHEDULE, chains[0].grid, score)


def geometric_mean(chains, c):
    forms = [quadratic_form(chain, 1.0) for chain in chains]
    return tuple(sum(w * form[k] for w, form in zip(c, forms, strict=True)) for k in range(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [(0.3, 0.5, 0.2), (-0.3, 0.6, 0.7)])
def test_gaussian_members_in_closed_form(kind, c):
    grid = torch.tensor([0.6, 0.45, 0.3, 0.2, 0.12], dtype=torch.float64)
    chains = [gaussian_chain(kind, grid, *law) for law in LINE]
    ours, target = quadratic_form(blended(chains, c), 1.0), geometric_mean(chains, c)
    assert log_mass(ours) == pytest.approx(0, abs=1e-10)
    path_kl, normalizer = gaussian_kl(moments(ours), moments(target)), log_mass(target)

    stack = Stack([chain.score for chain in chains])
    x = torch.randn(20_000, 1, generator=seeded(1), dtype=torch.float64)
    sde = BackwardSDE(SCHEDULE, Blend(stack, torch.tensor(c, dtype=torch.float64)))
    solution = solve(sde, x, grid, noise=seeded(2), step=STEPS[kind](), correct="certify")
    certificate = solution.certificate
    assert abs(certificate.value - path_kl) < Z * certificate.standard_error
    assert abs(solution.log_normalizer - normalizer) < Z * solution.log_normalizers[0][1]
    # controls: a factor of 1.2, and the geometric mean of slightly other coefficients
    other = geometric_mean(chains, (c[0] + 0.1, c[1] - 0.1, c[2]))
    for wrong in (1.2 * path_kl, gaussian_kl(moments(ours), moments(other))):
        assert abs(certificate.value - wrong) > Z * certificate.standard_error

    # and at every noise level: the divergence of the steps that end at it or above
    curve, levels = certificate.curve, (-SCHEDULE.log_snr(grid[1:]) / 2).exp()
    torch.testing.assert_close(curve.level, levels)
    for k, (level, nats) in enumerate(zip(levels.tolist(), curve.nats.tolist(), strict=True)):
        part = [gaussian_chain(kind, grid[: k + 2], *law) for law in LINE]
        exact = gaussian_kl(moments(quadratic_form(blended(part, c), 1.0)), moments(geometric_mean(part, c)))
        there = certificate.at(level)
        assert there.value == nats and there.level == pytest.approx(level) and there.steps == k + 1
        assert abs(nats - exact) < Z * there.standard_error < Z * 0.2 * exact
        if k < len(grid) - 2:  # the control: one step more
            assert abs(certificate.at(float(levels[k + 1])).value - exact) > Z * there.standard_error

    last = [(mean[-1:], covariance[-1:, -1:]) for mean, covariance in (moments(ours), moments(target))]
    assert gaussian_kl(*last) < path_kl


def path_densities(chains, c, points):
    """Return log densities of the blended chain's and the members' paths of two steps on a product grid."""
    start, middle = points[:, None, None], points[None, :, None]
    n = len(points)
    history = [start.expand(n, n, 1).reshape(-1, 1), middle.expand(n, n, 1).reshape(-1, 1)]

    def log_path(chain):
        first = chain.mean([points[:, None]])  # (n, 1)
        second = chain.mean(history).reshape(n, n, 1)
        v = [chain.variance(k) for k in range(2)]
        out = -(start.square() + math.log(2 * math.pi)) / 2
        out = out - (middle - first[:, :, None]).square() / (2 * v[0]) - math.log(2 * math.pi * v[0]) / 2
        return out - (points[None, None, :] - second).square() / (2 * v[1]) - math.log(2 * math.pi * v[1]) / 2

    geometric = sum(w * log_path(chain) for w, chain in zip(c, chains, strict=True))
    return log_path(blended(chains, c)), geometric


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_members_by_quadrature(kind):
    laws = [
        GaussianMixture([0.6, 0.4], [[-1.5], [1.5]], [0.16, 0.25]),
        GaussianMixture([0.2, 0.8], [[-1.0], [1.2]], [0.3, 0.2]),
    ]
    c, grid = (0.45, 0.55), torch.tensor([0.5, 0.36, 0.26], dtype=torch.float64)
    chains = [mixture_chain(kind, grid, law) for law in laws]
    points = torch.linspace(-6, 6, 121, dtype=torch.float64)
    width = float(points[1] - points[0])
    ours, geometric = path_densities(chains, c, points)
    assert float(ours.exp().sum()) * width**3 == pytest.approx(1, abs=1e-5)
    normalizer = math.log(float(geometric.exp().sum()) * width**3)
    path_kl = float((ours.exp() * (ours - geometric)).sum()) * width**3 + normalizer
    last = [density.exp().sum((0, 1)) * width**2 for density in (ours, geometric - normalizer)]
    last_kl = float((last[0] * (last[0].clamp_min(1e-300).log() - last[1].clamp_min(1e-300).log())).sum()) * width

    x = torch.randn(40_000, 1, generator=seeded(1), dtype=torch.float64)
    sde = BackwardSDE(SCHEDULE, Blend(MixtureStack(laws, SCHEDULE), torch.tensor(c, dtype=torch.float64)))
    solution = solve(sde, x, grid, noise=seeded(2), step=STEPS[kind](), correct="certify")
    certificate = solution.certificate
    assert abs(certificate.value - path_kl) < Z * certificate.standard_error < 0.2 * path_kl
    assert abs(solution.log_normalizer - normalizer) < Z * solution.log_normalizers[0][1]
    assert abs(certificate.value - 1.3 * path_kl) > Z * certificate.standard_error
    assert 0 < last_kl < path_kl

    # A last step to 0 has no noise: the bound stays and what it bounds shrinks.
    to_zero = torch.cat([grid, torch.zeros(1, dtype=torch.float64)])
    ended = solve(sde, x, to_zero, noise=seeded(2), step=STEPS[kind](), correct="certify").certificate
    assert ended.value == pytest.approx(certificate.value, rel=0.3) and float(ended.profile[-1]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["certify", "resample"])
def test_certificate_and_correction_cost_no_evaluation(kind, mode):
    grid, x = time_grid(SCHEDULE, 12), SCHEDULE.prior((30, 2), generator=seeded(1))
    counts, samples = [], []
    for correct in (None, mode):
        stack = CountingStack(MixtureStack(PLANE, SCHEDULE))
        sde = BackwardSDE(SCHEDULE, Blend(stack, Preference([0.9, 0.4], strength=1.5)))
        solution = solve(sde, x, grid, noise=seeded(2), step=STEPS[kind](), correct=correct)
        counts.append((stack.evaluations, stack.calls, solution.evaluations))
        samples.append(solution.samples)
    assert counts[0] == counts[1] == (3 * 12 * 30, 12, 3 * 12)
    assert torch.equal(*samples) is (mode == "certify")


def certify(c, batch=4000, dtype=torch.float64, steps=20):
    sde = BackwardSDE(SCHEDULE, Blend(MixtureStack(PLANE, SCHEDULE), torch.tensor(c, dtype=torch.float64)))
    x = SCHEDULE.prior((batch, 2), generator=seeded(1), dtype=dtype)
    return solve(sde, x, time_grid(SCHEDULE, steps), noise=seeded(2), correct="certify")


def test_what_a_certificate_says_adds_up():
    solution = certify(MIXTURES["inside"])
    certificate = solution.certificate
    torch.testing.assert_close(certificate.per_sample, -solution.log_weights)
    assert bool((certificate.per_sample >= 0).all()) and certificate.nonnegative
    assert certificate.profile.shape == (20,) and bool((certificate.profile >= 0).all())
    assert float(certificate.profile.sum()) == pytest.approx(float(certificate.per_sample.mean()), rel=1e-10)
    log_mean = float((-certificate.per_sample).logsumexp(0)) - math.log(4000)
    assert certificate.value == pytest.approx(log_mean + float(certificate.per_sample.mean()), rel=1e-9)
    assert solution.log_normalizer == pytest.approx(log_mean, rel=1e-9)
    w = (-certificate.per_sample).exp()
    assert solution.ess_fraction == pytest.approx(float(w.mean() ** 2 / w.square().mean()), rel=1e-9)
    assert certificate.tv_bound == pytest.approx(math.sqrt(certificate.value / 2))
    assert certificate.samples == pytest.approx(4000) and solution.resampled == [] and solution.notes == ()
    assert not certify(MIXTURES["beyond"]).certificate.nonnegative


def test_standard_errors_are_those_of_repetitions():
    # 200 problems of 200 samples in one run: each group has a certificate of its own.
    groups = torch.arange(40_000) % 200
    sde = BackwardSDE(SCHEDULE, Blend(MixtureStack(PLANE[:2], SCHEDULE), [0.5, 0.5]))
    x = SCHEDULE.prior((40_000, 2), generator=seeded(1), dtype=torch.float64)
    run = solve(sde, x, time_grid(SCHEDULE, 10), noise=seeded(2), correct=Correction(groups=groups))
    assert len(run.certificates) == len(run.log_normalizers) == 200
    assert run.certificate is None and run.log_normalizer is None and run.ess_fraction is None
    for pairs in ([(c.value, c.standard_error) for c in run.certificates], run.log_normalizers):
        values, errors = torch.tensor(pairs, dtype=torch.float64).T
        assert 0.75 < float(errors.mean() / values.std()) < 1.33  # the spread of 200 is known to 5 %
    whole = solve(sde, x, time_grid(SCHEDULE, 10), noise=seeded(2), correct="certify")
    torch.testing.assert_close(run.certificates[3].per_sample, whole.certificate.per_sample[groups == 3])


def test_equal_members_have_nothing_to_certify():
    sde = BackwardSDE(SCHEDULE, Blend(MixtureStack([PLANE[0]] * 2, SCHEDULE), [0.5, 0.5]))
    x = SCHEDULE.prior((50, 2), generator=seeded(1))
    certificate = solve(sde, x, time_grid(SCHEDULE, 10), noise=seeded(2), correct="certify").certificate
    assert certificate.value == pytest.approx(0, abs=1e-9) and certificate.ess_fraction == pytest.approx(1)
    assert certificate.warning is None


def test_a_bad_blend_is_warned_of():
    far = [GaussianMixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], [0.1, v]) for v in (0.05, 1.0)]
    sde = BackwardSDE(SCHEDULE, Blend(MixtureStack(far, SCHEDULE), [0.5, 0.5]))
    x = SCHEDULE.prior((2000, 2), generator=seeded(1))
    certificate = solve(sde, x, time_grid(SCHEDULE, 40), noise=seeded(2), correct="certify").certificate
    assert certificate.value > 0.1 and "nats from its target" in certificate.warning
    assert "\n" not in certificate.warning and "nats" in str(certificate)


def test_float32_paths_are_certified_as_float64_ones():
    one, two = certify(MIXTURES["inside"], dtype=torch.float32), certify(MIXTURES["inside"])
    assert one.log_weights.dtype == torch.float64 and one.samples.dtype == torch.float32
    gap = abs(one.certificate.value - two.certificate.value)  # other draws: the same law only
    assert gap < Z * math.hypot(one.certificate.standard_error, two.certificate.standard_error)


def test_few_paths_give_the_one_sided_bound():
    for batch in (1, 3):
        certificate = certify(MIXTURES["inside"], batch=batch).certificate
        assert not certificate.normalised and certificate.reliable
        assert certificate.value == pytest.approx(float(certificate.per_sample.mean()), rel=1e-12)
        assert "at most" in str(certificate)
    assert certify(MIXTURES["inside"], batch=1).certificate.standard_error == math.inf
    beyond = certify(MIXTURES["beyond"], batch=3).certificate
    assert not beyond.reliable and "negative" in beyond.warning


def made(nats, ess=0.9, samples=4000.0, **options):
    """Return a certificate of these numbers."""
    given = {"per_sample": torch.zeros(round(samples)), "profile": torch.ones(10), "nonnegative": True} | options
    return Certificate(nats, 0.01, ess, samples=samples, **given)


@pytest.mark.parametrize(
    ("certificate", "word", "advice"),
    [
        (made(0.004), "exact", None),
        (made(0.05), "close", None),
        (made(0.05, ess=0.3), "correct it", "correct='resample'"),
        (made(0.4, ess=0.3), "correct it", "correct='resample'"),
        (made(0.4, ess=0.3, resampled=True), "corrected", "were corrected by resampling"),
        (made(9.0, ess=0.001, reverse=9.0), "too far to correct with 4000 samples", "it takes about 8.1e+04"),
        (made(2.0, ess=0.3, samples=8.0, normalised=False), "too far to correct with 8 samples", "down_to"),
        (made(2.0, ess=1.0, samples=1.0, normalised=False), "too few samples to tell", "draw at least 10"),
        (made(40.0, ess=0.001, normalised=False), "too far to correct with 4000 samples", "more than a million"),
        (made(0.4, ess=0.001, nonnegative=False), "UNRELIABLE", "negative"),
        (made(0.4, per_sample=torch.zeros(50_000)), "UNRELIABLE", "resampling has left"),
    ],
)
def test_a_word_and_advice_that_fit_the_run(certificate, word, advice):
    assert certificate.word == word and str(certificate).endswith(f": {word}") and "\n" not in str(certificate)
    assert certificate.warning is None if advice is None else advice in certificate.warning
    assert len(repr(certificate)) < 50


def test_what_nats_mean():
    assert made(0.5).tv_bound == pytest.approx(0.5) and made(8.0).tv_bound == pytest.approx(math.sqrt(1 - math.exp(-8)))
    assert made(-0.1).tv_bound == 0 and made(1e4).tv_bound == 1
    assert made(9.0, normalised=False).needed == pytest.approx(math.exp(9))
    assert made(17.0, reverse=2.0).needed == pytest.approx(math.exp(2))
    assert made(1.0, reverse=-0.1).needed == 1 and math.isfinite(made(1e4, normalised=False).needed)
    assert made(6.0, dimension=12).per_dimension == 0.5 and made(6.0).per_dimension is None
    late = torch.tensor([1.0] * 9 + [0.0, 3.0, 0.0])  # ten steps with noise
    assert made(1.0, profile=late, steps=12).last_share == 0.25
    assert "last steps" in str(made(1.0, profile=torch.tensor([1.0, 4.0]), steps=2))
    assert made(0.0, profile=torch.zeros(3), steps=3).last_share == 0


def test_what_the_target_would_need_is_the_divergence_the_other_way():
    solution = certify(MIXTURES["inside"], batch=20_000)
    certificate = solution.certificate
    w = solution.log_weights.softmax(0)
    assert certificate.reverse == pytest.approx(float((w * (w * 20_000).log()).sum()), rel=1e-9)
    assert 1 < certificate.needed < 1 / certificate.ess_fraction  # Jensen
    assert certificate.dimension == 2 and certificate.per_dimension == certificate.value / 2


def test_a_reward_gap_is_the_closed_form():
    problem, preference = line2(0.5), Preference({"right": 0.5, "left": 0.5})
    x = SCHEDULE.prior((20_000, 1), generator=seeded(1), dtype=torch.float64)
    sde, grid = BackwardSDE(SCHEDULE, Blend(problem.stack(SCHEDULE), preference)), time_grid(SCHEDULE, 60)
    groups = torch.arange(20_000) % 100
    run, whole = (solve(sde, x, grid, noise=seeded(2), correct=c) for c in (Correction(groups=groups), "certify"))
    for name, reward in problem.rewards.items():
        r = reward(whole.samples)
        exact = (problem.target(preference).mean_reward(reward) - float(r.mean())) / float(r.std())
        gap = whole.certificate.reward_gap(r)
        width = (gap.high - gap.low) / 1.96 / 2
        assert abs(gap.value - exact) < Z * width and abs(exact) > Z * width
        # the interval holds the truth as often as it says, and one of half its width does not
        found = [c.reward_gap(r[groups == g]) for g, c in enumerate(run.certificates)]
        held = sum(g.low < exact < g.high for g in found)
        half = sum(abs(g.value - exact) < (g.high - g.low) / 4 for g in found)
        assert held >= 85 > half, name
    with pytest.raises(ValueError, match="got a resampled run"):
        made(0.1, resampled=True).reward_gap(torch.zeros(4000))
    with pytest.raises(ValueError, match=r"each of 4000 samples .*got shape \(3,\)"):
        made(0.1).reward_gap(torch.zeros(3))
    with pytest.raises(ValueError, match="rewards that differ"):
        made(0.1).reward_gap(torch.zeros(4000))
