"""Names belong to the stack: on every stack of mixtures and networks a preference by name never goes by order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sdeblend import SCHEDULES, Blend, NoiseSchedule, Preference, ScoreStack
from tests.support.strategies import generator
from toy import PROBLEMS, MixtureStack, mixture_score
from toy.evaluate.backend import build

SCHEDULE: NoiseSchedule = SCHEDULES["vp-linear"]()
T = torch.tensor(0.3, dtype=torch.float64)


def mixtures() -> MixtureStack:
    problem = PROBLEMS["ring8"]()
    return MixtureStack([problem.base, *problem.members(), problem.target([0.5, 0.5])], SCHEDULE, ("a", "b", "both"))


def networks() -> ScoreStack:
    table = {"problems": ["line2"], "scores": "learned", "train_steps": 10, "rank": 2}
    return build(table, file="f", seed=0, device=torch.device("cpu")).case("line2", "").stack(6)


STACKS: dict[str, Callable[[], ScoreStack]] = {
    **{name: lambda make=make: make().stack(SCHEDULE) for name, make in PROBLEMS.items()},  # type: ignore[misc]
    "mixtures": mixtures,
    "networks": networks,
}
DIMENSIONS = {"line2": 1, "conflict_line": 1, "networks": 1, "high_dimension": 64}


@pytest.mark.parametrize("kind", STACKS)
def test_another_order_of_the_names_gives_the_same_blend_and_a_misspelt_name_none(kind: str) -> None:
    stack = STACKS[kind]()
    assert stack.names is not None
    weights = {name: 0.1 + 0.2 * place for place, name in enumerate(stack.names)}
    x = torch.randn(6, DIMENSIONS.get(kind, 2), generator=generator(0))
    expected = torch.einsum(
        "k,kbd->bd", torch.tensor([1 - sum(weights.values()), *weights.values()]), stack(x, T).detach()
    )
    for names in (list(weights), list(reversed(weights))):
        named = Preference({name: weights[name] for name in names})
        torch.testing.assert_close(Blend(stack, named)(x, T).detach(), expected, rtol=1e-4, atol=1e-4)
    # Control: what names are for is seen in the blend.
    if len(weights) > 1:
        swapped = Preference(list(reversed(weights.values())))
        assert float((Blend(stack, swapped)(x, T).detach() - expected).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="can weigh only"):
        Blend(stack, Preference({f"{stack.names[0]}s": 1.0}))


def test_a_named_preference_reaches_the_target_that_it_names() -> None:
    # By order it would be the other reward's: mean +2.15 in place of -1.35.
    problem = PROBLEMS["line2"]()
    wanted = Preference({"left": 1.0, "right": 0.0})
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    blend = Blend(problem.stack(SCHEDULE), wanted)
    torch.testing.assert_close(blend(x, T), mixture_score(problem.target(wanted), SCHEDULE)(x, T))


def test_a_stack_of_mixtures_without_names_takes_weights_in_order_only() -> None:
    problem = PROBLEMS["ring8"]()
    stack = MixtureStack([problem.base, *problem.members()], SCHEDULE)
    with pytest.raises(ValueError, match="weights by name need a stack with names"):
        Blend(stack, Preference({"right": 0.5, "up": 0.5}))
    assert torch.equal(Blend(stack, Preference([0.5, 0.5])).coefficients, torch.tensor([0, 0.5, 0.5]).double())
