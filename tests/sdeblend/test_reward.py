"""Rewards: how they are found, how they are weighed, what is refused."""

from __future__ import annotations

import pytest
import torch

from sdeblend.reward import Reward, WeightedReward, as_reward, find_reward


class Words:
    def __init__(self, *prompts):
        self.prompts = prompts


def lengths(samples, condition):
    return torch.tensor([float(len(prompt)) for prompt in condition.prompts])


LENGTH = Reward("length", lengths, differentiable=False, unit="letters")
X = torch.zeros(3, 2)


def test_rewards_are_found_by_name():
    made = []

    def learned(model=None):
        made.append(model)
        return LENGTH

    known = {"length": LENGTH, "learned": learned}
    assert find_reward("length", known) is LENGTH and not made
    assert find_reward("learned", known, model="weights") is LENGTH and made == ["weights"]
    own = find_reward("torch:sum", {})
    assert own.function is torch.sum and own.differentiable


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("width", {}, "one of length or 'package.module:function', got 'width'"),
        ("length", {"model": "w"}, "takes no options, got model 'w'"),
        ("nowhere.at.all:f", {}, "importable"),
        ("torch:nothing", {}, "importable"),
        ("torch:float32", {}, "must be a function"),
    ],
)
def test_what_is_no_reward_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        find_reward(name, {"length": LENGTH}, **options)


def test_a_function_says_whether_it_is_differentiable():
    def steps(samples, condition):
        return samples[:, 0].round()

    assert as_reward("steps", steps).differentiable
    steps.differentiable = False
    assert not as_reward("steps", steps).differentiable


def test_weights_name_the_rewards():
    both = WeightedReward({"length": LENGTH, "first": lambda x, _: x[:, 0]}, {"length": 2.0, "first": -1.0})
    assert both(X + 1, Words("a", "bcd", "")).tolist() == [1, 5, -1]
    with pytest.raises(ValueError, match="each reward needs one weight, got rewards length and weights for width"):
        WeightedReward({"length": LENGTH}, {"width": 1.0})
    with pytest.raises(ValueError, match="shape"):
        WeightedReward({"all": lambda x, _: x})(X)
    with pytest.raises(ValueError, match="finite, got nan for sample 0"):
        WeightedReward({"nan": lambda x, _: x[:, 0] * torch.nan})(X)
