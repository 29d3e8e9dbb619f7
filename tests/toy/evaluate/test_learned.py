"""Networks as members: soups of differences and of factors, where they agree and where they must not."""

import pytest
import torch

from sdeblend.methods.draws import Draws
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from tests.support.strategies import generator
from toy.evaluate.backend import build

TABLE = {"problems": ["ring8"], "scores": "learned", "train_steps": 20, "rank": 3, "steps": 4}
X = 2 * torch.randn(50, 2, generator=generator(0))
T = torch.tensor(0.2, dtype=torch.float64)


def learned():
    return build(TABLE, file="f", seed=3, device=torch.device("cpu")).case("ring8", "")


@pytest.fixture(scope="module")
def case():
    return learned()


def soup(case, role, first, second, strength=1.0):
    return case.score(role, Preference({"right": first, "up": second}, strength), 50)


@pytest.mark.parametrize("role", ["soup-deltas", "soup-factors"])
def test_a_soup_at_a_corner_is_the_member(case, role):
    base, right, up = case.stack(50)(X, T)
    torch.testing.assert_close(soup(case, role, 1.0, 0.0)(X, T), right)
    torch.testing.assert_close(soup(case, role, 0.0, 1.0)(X, T), up)
    torch.testing.assert_close(soup(case, role, 0.4, 0.6, strength=0.0)(X, T), base)
    assert float((right - up).abs().max()) > 1e-3


def test_a_soup_averages_differences_and_not_factors(case):
    base = dict(case.network.named_parameters())
    found = dict(soup(case, "soup-deltas", 0.4, 0.6).network.named_parameters())
    (first, second), name = (factors[0] for factors in case.factors), "layers.0.weight"
    expected = base[name] + 0.4 * first[0] @ first[1] + 0.6 * second[0] @ second[1]
    torch.testing.assert_close(found[name], expected)
    crossed = dict(soup(case, "soup-factors", 0.4, 0.6).network.named_parameters())[name] - base[name]
    up, down = (0.4 * a + 0.6 * b for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(crossed, up @ down)
    assert float((crossed - (found[name] - base[name])).abs().max()) > 1e-4
    assert found["layers.0.bias"].equal(base["layers.0.bias"])


@pytest.mark.rng_untouched
def test_the_same_seed_gives_the_same_networks_and_samples(case):
    again, wanted = learned(), Preference({"right": 0.5, "up": 0.5})
    assert torch.equal(again.stack(50)(X, T), case.stack(50)(X, T))
    for name in ("mpa", "soup", "soup-factors", "exact", "guidance"):
        drawn, other = (METHODS[name](c, wanted, Draws(0, "", range(8))) for c in (case, again))
        assert torch.equal(drawn.samples, other.samples)
        assert drawn.model_calls == (8 if name == "mpa" else 4)
    assert case.higher_order("pairs", wanted, 8) is None
