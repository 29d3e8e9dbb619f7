"""Methods with moves: nearer to the target, one member where there is one, and a budget that is kept."""

import pytest
import torch

from sdeblend import VPLinear, place_moves, time_grid
from sdeblend.methods.case import NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from sdeblend.stacks import CountingStack
from sdeblend.steps import EulerMaruyama, ExponentialMultistep
from tests.support.cases import ProblemCase
from toy.metrics import mode_weight_tv
from toy.problems import conflict_line

SCHEDULE = VPLinear()
PROBLEM, EQUAL = conflict_line(0.1), Preference({"right": 0.5, "left": 0.5})
GRID = time_grid(SCHEDULE, 60)


def case(**options):
    return ProblemCase(PROBLEM, **{"grid": GRID, "step": EulerMaruyama()} | options)


def sampled(name, count=1500, where=None, wanted=EQUAL, **options):
    return METHODS[name](where or case(), wanted, Draws(1, "", range(count)), **options)


def distance(drawn):
    return float(mode_weight_tv(drawn.samples, PROBLEM.target(EQUAL), log_weights=drawn.log_weights).value)


def test_moves_come_nearer_and_those_by_one_member_for_the_price_of_db_mpa():
    plain, moved, one = (sampled(name, 3000) for name in ("mpa", "mpa-moves", "ls-moves"))
    # the error of one run is .01
    assert max(distance(moved), distance(one)) + 0.05 < distance(plain)
    assert plain.model_calls == 120 and one.model_calls == 119 and moved.model_calls == 238
    assert moved.facts["certificate"] > 0 and moved.log_weights is None
    corrected = sampled("mpa-corrected-moves", 3000)
    assert distance(corrected) + 0.05 < distance(moved) and corrected.ancestors is not None


def test_a_single_member_moves_alone():
    corner = Preference({"right": 0.0, "left": 1.0})
    torch.testing.assert_close(*(sampled(n, 50, wanted=corner).samples for n in ("mpa-moves", "ls-moves")))
    still = sampled("mpa-moves", 50, moves=0).samples
    assert torch.equal(still, sampled("mpa", 50).samples)


@pytest.mark.parametrize("name", ["mpa-moves", "ls-moves", "mpa-corrected-moves"])
def test_a_pilot_places_the_same_budget_and_is_paid_for(name):
    counting = CountingStack(PROBLEM.stack(SCHEDULE))
    drawn = sampled(name, 100, where=case(stack=counting), placing="pilot", pilot=20, moves=2)
    assert counting.evaluations == pytest.approx(100 * drawn.model_calls)
    uniform = sampled(name, 100, moves=2)
    assert drawn.model_calls == pytest.approx(uniform.model_calls + 120 * 20 / 100)
    pilot = sampled("mpa", 20).solution.certificate.profile
    counts = place_moves(pilot[1:], 118)
    assert max(counts) > 4 and counts[0] == 0  # it is not spread evenly


def test_what_needs_noise_says_so():
    ode = case(step=ExponentialMultistep(stochastic=False))
    with pytest.raises(NotApplicable, match="pilot's certificate needs"):
        sampled("ls-moves", 10, where=ode, placing="pilot")
    with pytest.raises(NotApplicable, match="needs a solver with noise"):
        sampled("mpa-corrected-moves", 10, where=ode)
    assert sampled("mpa-moves", 10, where=ode).facts == {}
    with pytest.raises(NotApplicable, match="probabilities"):
        sampled("ls-moves", 10, wanted=Preference(EQUAL.weights, 2.0))
