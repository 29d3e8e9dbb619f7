"""Methods against closed forms: each has the law it claims, costs what it says, and a control that fails."""

import math

import pytest
import torch
from scipy import integrate, stats

from sdeblend import VPLinear, time_grid
from sdeblend.methods.case import NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.guidance import RewardGuidance, tempered
from sdeblend.methods.interpolation import pairwise, quadratic_strength
from sdeblend.methods.registry import METHODS
from sdeblend.methods.union import sample_union
from sdeblend.preference import Preference
from sdeblend.stacks import CountingStack
from sdeblend.steps import Ancestral, EulerMaruyama, ExponentialMultistep
from tests.support.cases import ProblemCase
from tests.support.strategies import generator, refuses
from toy import GaussianMixture, MixtureStack, QuadraticReward, mixture_score
from toy.problems import Problem, line2

SCHEDULE = VPLinear()
GRID = time_grid(SCHEDULE, 60, "log-snr")
PROBLEM = line2(kl_weight=0.5)
RIGHT = PROBLEM.rewards["right"]


FOR_RIGHT = Preference({"right": 1.0})


def sampled(name, count, *, problem=PROBLEM, reward=None, grid=None, step=None, stack=None, **options):
    """Sample a method for one reward, the problem's or another in its place."""
    rewards = {} if reward is None else {"right": reward}
    case = ProblemCase(problem, grid=grid, step=step, stack=stack, rewards=rewards)
    return METHODS[name](case, FOR_RIGHT, Draws(1, "", range(count)), **options)


def starts(count, seed=0):
    return SCHEDULE.prior((count, 1), generator=generator(seed), dtype=torch.float64)


def share_right(samples, log_weights=None):
    """Return P(x > 0) and its standard error, weights considered."""
    w = torch.full((len(samples),), 1 / len(samples), dtype=torch.float64)
    w = w if log_weights is None else log_weights.softmax(0)
    right = (samples[:, 0] > 0).double()
    p = float((w * right).sum())
    return p, float((w * (right - p)).square().sum().sqrt())


def exact_right(mixture):
    scales = mixture.covariances[:, 0, 0].sqrt()
    return float((mixture.weights * torch.special.ndtr(mixture.means[:, 0] / scales)).sum())


# Resampling correlates particles; the error of independent ones is too small by about this factor here.
GENEALOGY = 3.0


@pytest.mark.parametrize("potential", ["difference", "maximum", "sum"])
def test_steering_has_the_law_of_the_tilt(potential):
    # "maximum" and "sum" compound over resampling times until few particles are left: two times are few enough.
    drawn = sampled(f"steer-{potential}", 20_000, every=5 if potential == "difference" else 20)
    p, error = share_right(drawn.samples, drawn.log_weights)
    error *= GENEALOGY
    assert abs(p - exact_right(PROBLEM.member("right"))) < 5 * error
    # The control: the tilt at 1.5 times the KL weight is another law.
    assert abs(p - exact_right(PROBLEM.member("right", kl_weight=0.75))) > 5 * error


def test_best_of_n_has_the_law_of_the_largest():
    problem = Problem("normal", GaussianMixture([1.0], [[0.0]], [1.0]), {"right": QuadraticReward([1.0])}, 1.0)
    # Ancestral steps would lose a tenth of the variance on this grid, and with it of the result.
    drawn = sampled("best-of-n", 5_000, problem=problem, step=ExponentialMultistep(), candidates=4)
    samples, n = drawn.samples[:, 0], 4

    def mean_of_largest(n):
        return integrate.quad(lambda z: z * n * stats.norm.pdf(z) * stats.norm.cdf(z) ** (n - 1), -8, 8)[0]

    error = float(samples.std()) / math.sqrt(len(samples))
    assert abs(float(samples.mean()) - mean_of_largest(n)) < 5 * error
    assert abs(float(samples.mean()) - mean_of_largest(n - 1)) > 5 * error
    assert drawn.model_calls == 4 * 60 and drawn.reward_calls == 4


def test_code_climbs_and_costs_what_it_says():
    count, counting = 500, CountingStack(PROBLEM.stack(SCHEDULE))
    drawn = sampled("code", count, stack=counting, candidates=4, block=10)
    assert counting.evaluations == drawn.model_calls * count and drawn.reward_calls == 4 * 6
    blind = sampled("code", count, reward=lambda x: torch.zeros(len(x)), candidates=4, block=10)
    reward, floor = RIGHT(drawn.samples), RIGHT(blind.samples)
    error = math.hypot(float(reward.std()), float(floor.std())) / math.sqrt(count)
    assert float(reward.mean() - floor.mean()) > 5 * error
    # The control: without a reward to see it samples the base.
    assert abs(float(floor.mean()) - PROBLEM.base.mean_reward(RIGHT)) < 5 * float(floor.std()) / math.sqrt(count)


def failing(reward, wrong):
    """Return a reward that has no value where ``wrong`` says so."""
    return lambda x: torch.where(wrong(x), torch.nan, reward(x))


@pytest.mark.parametrize("search", ["code", "best-of-n"])
def test_a_search_never_prefers_a_candidate_whose_reward_failed(search):
    def chosen(reward):
        return sampled(search, 60, reward=reward, candidates=4, **({"block": 30} if search == "code" else {}))

    def too_far(x):
        return x[:, 0] > 0.5

    drawn = chosen(failing(RIGHT, too_far))
    avoided = chosen(lambda x: torch.where(too_far(x), -1e9, RIGHT(x)))
    assert torch.equal(drawn.samples, avoided.samples) and not drawn.paired
    assert float(too_far(chosen(RIGHT).samples).double().mean()) > 0.5 > float(too_far(drawn.samples).double().mean())
    refuses(lambda: chosen(lambda x: x[:, 0] * torch.nan), "finite for at least one", kind=FloatingPointError)


@pytest.mark.parametrize("potential", ["difference", "maximum", "sum"])
def test_steering_gives_no_weight_to_particles_whose_reward_failed(potential):
    def steered(reward, count=400, threshold=0.5):
        return sampled(f"steer-{potential}", count, reward=reward, every=20, threshold=threshold)

    for threshold in (0.5, 1e-6):  # with resampling, and without
        drawn = steered(failing(RIGHT, lambda x: x[:, 0] < 0), threshold=threshold)
        weights = drawn.log_weights.softmax(0)
        left = drawn.samples[:, 0] < 0
        assert bool(weights.isfinite().all()) and float(weights[left].sum()) == 0.0
        assert 2 <= drawn.effective <= 400
    assert bool((steered(RIGHT).samples < 0).any())
    calls = iter([[0, 1], [1, 0]])

    def in_turn(x):
        return torch.tensor(next(calls)) == 1  # each of the two once, and never both

    refuses(lambda: steered(failing(RIGHT, in_turn), 2, 1e-6), "one of 2 particles", "step 40", kind=FloatingPointError)


def test_guidance_leaves_alone_what_its_reward_fails_on():
    def base(x, t):
        return PROBLEM.base.noised(SCHEDULE, t).score(x)

    def guided(reward):
        return RewardGuidance(base, SCHEDULE, {"r": reward}, {"r": 1.0}, 2.0)(x, GRID[30])

    def first(x):
        return torch.arange(len(x)) == 0

    x = starts(5)
    # The root's slope at the first, infinite, is there whatever the mask says.
    found = guided(failing(lambda y: RIGHT(y) + (y[:, 0] - y[:, 0].detach()).where(first(y), 1.0).sqrt(), first))
    torch.testing.assert_close(found[1:], guided(RIGHT)[1:])
    assert torch.equal(found[:1], base(x, GRID[30])[:1])
    refuses(lambda: guided(lambda y: y[:, 0] * torch.nan), "finite for at least one", kind=FloatingPointError)


def test_guidance_is_the_gradient_of_the_predicted_reward():
    base, t = GaussianMixture([1.0], [[0.4]], [0.5]), torch.tensor(0.3, dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1)
    plain = mixture_score(base, SCHEDULE)
    reward = QuadraticReward([0.7], [[0.4]])

    def differentiable(x, t):
        return base.noised(SCHEDULE, t).score(x)

    guided = RewardGuidance(differentiable, SCHEDULE, {"r": reward}, {"r": 2.0}, scale=0.5)
    # One Gaussian: E[x_0 | x] is linear in x, of slope a c / (a^2 c + s^2).
    a, s2 = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t).square())
    slope = a * 0.5 / (a**2 * 0.5 + s2)
    clean = 0.4 + slope * (x - a * 0.4)
    torch.testing.assert_close(guided(x, t), plain(x, t) + 0.5 * 2.0 * slope * (0.7 - 0.4 * clean))
    unit = RewardGuidance(differentiable, SCHEDULE, {"r": reward}, {"r": 2.0}, scale=0.5, normalised=True)
    torch.testing.assert_close((unit(x, t) - plain(x, t)).abs(), torch.ones_like(x))
    refuses(lambda: RewardGuidance(differentiable, SCHEDULE, {"r": reward}, {"q": 1.0}, 0.5), "each reward needs one")


def test_tempered_guidance_grows_with_the_step():
    times = [float(t) for t in GRID[:-1]]
    at = tempered(10.0, 0.05, GRID)
    for step, t in enumerate(times):
        expected = 10.0 * min(1.05**step - 1, 1.0)
        assert at(torch.tensor(t, dtype=torch.float64)) == pytest.approx(expected)
        # a solver that looks inside a step is guided as at its start
        assert at(torch.tensor((t + float(GRID[step + 1])) / 2, dtype=torch.float64)) == pytest.approx(expected)
    assert at(GRID[0]) == 0.0 and at(GRID[-2]) == 10.0

    def base(x, t):
        return PROBLEM.base.noised(SCHEDULE, t).score(x)

    plain, guided = (RewardGuidance(base, SCHEDULE, {"r": RIGHT}, {"r": 1.0}, scale) for scale in (10.0, at))
    x = starts(5)
    assert torch.equal(guided(x, GRID[0]), base(x, GRID[0])) and torch.equal(guided(x, GRID[-2]), plain(x, GRID[-2]))
    refuses(lambda: tempered(1.0, 0.0, GRID), "gamma above 0")


def test_a_union_is_the_mixture_of_its_members():
    members = [PROBLEM.member("right", 0.25), PROBLEM.member("left", 0.25)]
    stack, grid = MixtureStack([PROBLEM.base, *members], SCHEDULE), time_grid(SCHEDULE, 200)
    drawn = sample_union(ProblemCase(PROBLEM, stack=stack, grid=grid), [0.0, 0.3, 0.7], Draws(1, "", range(20_000)))
    exact = 0.3 * exact_right(members[0]) + 0.7 * exact_right(members[1])
    p, error = share_right(drawn.samples)
    assert abs(p - exact) < 5 * error + 0.005  # 200 steps; the second term is what discretisation may cost
    swapped = 0.7 * exact_right(members[0]) + 0.3 * exact_right(members[1])
    assert abs(p - swapped) > 5 * error + 0.005
    assert drawn.model_calls == 2 * 200 and 0 <= drawn.facts["entropy"] < math.log(2)


@pytest.mark.parametrize("step", [Ancestral(), Ancestral(eta=0.5), ExponentialMultistep(), EulerMaruyama()])
def test_a_union_keeps_the_solvers_step(step):
    laws = [PROBLEM.member("right", 0.25), PROBLEM.member("left", 0.25)]
    case = ProblemCase(
        PROBLEM, stack=MixtureStack(laws, SCHEDULE), grid=time_grid(SCHEDULE, 200, "log-snr"), step=step
    )
    draws = Draws(1, "", range(20_000))
    p, error = share_right(sample_union(case, [0.3, 0.7], draws).samples)
    assert abs(p - 0.3 * exact_right(laws[0]) - 0.7 * exact_right(laws[1])) < 5 * error
    # A single member is sampled as it is alone.
    alone, same = sample_union(case, [0.0, 1.0], draws), case.solve(mixture_score(laws[1], SCHEDULE), draws)
    torch.testing.assert_close(alone.samples, same.samples, rtol=1e-6, atol=1e-6)
    case.step = ExponentialMultistep(stochastic=False)
    with pytest.raises(NotApplicable, match="a solver that has some"):
        sample_union(case, [1.0, 1.0], draws)


def control_error(mixtures, coefficients, target, t):
    x = PROBLEM.base.noised(SCHEDULE, t).sample(2_000, generator=generator(3))
    scores = [m.noised(SCHEDULE, t).score(x) for m in mixtures]
    blend = sum(c * s for c, s in zip(coefficients, scores, strict=True))
    return float((blend - target.noised(SCHEDULE, t).score(x)).square().mean().sqrt())


@pytest.mark.parametrize("t", [0.1, 0.3])
def test_higher_orders_cut_the_error(t):
    base, alpha = PROBLEM.base, 1.0
    one, half = base.tilt(RIGHT, kl_weight=alpha), base.tilt(RIGHT, kl_weight=2 * alpha)
    target = base.tilt(RIGHT, kl_weight=alpha / 0.3)
    c = quadratic_strength(0.3)
    assert sum(c.values()) == pytest.approx(1)
    linear = control_error([base, one], [0.7, 0.3], target, t)
    assert control_error([base, half, one], [c["base"], c["half"], c["full"]], target, t) < linear / 2
    left = PROBLEM.rewards["left"]
    w = pairwise({"a": 0.3, "b": 0.7})
    assert sum(w.values()) == pytest.approx(1)
    members = [base.tilt(r, kl_weight=alpha) for r in (RIGHT, left, 0.5 * RIGHT + 0.5 * left)]
    both = base.tilt(0.3 * RIGHT + 0.7 * left, kl_weight=alpha)
    plain = control_error(members[:2], [0.3, 0.7], both, t)
    assert control_error(members, [w["a"], w["b"], w["a+b"]], both, t) < plain / 2


def test_what_cannot_serve_is_refused():
    for name, options in (("code", {"candidates": 1}), ("code", {"block": 0}), ("best-of-n", {"candidates": 1}),
                          ("steer-sum", {"every": 0}), ("mpa", {"candidates": 2})):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            sampled(name, 4, **options)
    with pytest.raises(NotApplicable, match="ends at 0"):
        sampled("steer-sum", 4, grid=GRID[:-1])
    case = ProblemCase(PROBLEM)
    with pytest.raises(NotApplicable, match="not negative"):
        sample_union(case, [0.0, -1.0, 2.0], Draws(0, "", range(4)))
    refuses(lambda: METHODS["mpa"](case, Preference({"rihgt": 1.0}), Draws(0, "", range(4))), "rihgt")
    case.kl_weight = None
    with pytest.raises(NotApplicable, match="kl_weight"):
        METHODS["steer-sum"](case, FOR_RIGHT, Draws(0, "", range(4)))
    refuses(lambda: pairwise({"a": 1.0, "b": 1.0}), "sum to 1")
