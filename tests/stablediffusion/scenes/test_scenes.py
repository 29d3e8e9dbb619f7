"""The small model's data: captions mean what the drawings show, and what is held out never reaches training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from stablediffusion.making.tokenizer import MAX_LENGTH, tokenizer
from stablediffusion.making.train_text import tokens
from stablediffusion.scenes.captions import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    caption,
    complete,
    complete_scenes,
    held_out,
    held_out_captions,
    mention,
    parse,
    sample_scenes,
)
from stablediffusion.scenes.drawing import RADII, coverage, draw
from stablediffusion.scenes.factors import ABSENT, FACTORS, indices
from stablediffusion.scenes.scorer import WEIGHTS, accuracies, load_scorer, log_prob
from tests.support.strategies import generator, refuses, seeds

RED_CIRCLE = Scene((Thing("circle", "red", "large", "center"),), "blue", "plain")


@given(seeds)
def test_captions_are_read_back(seed):
    scenes = mention(complete_scenes(8, generator(seed)), generator(seed))
    assert [parse(caption(scene)) for scene in scenes] == scenes


def test_either_order_of_the_background_is_understood():
    first = parse("a large red circle on a striped blue background")
    assert parse("A large red circle on a  blue striped background") == first
    assert first == Scene((Thing("circle", "red", "large"),), "blue", "striped")


@pytest.mark.parametrize("text", ["", "a red cat", "a red circle on a plain blue striped background", "red circle"])
def test_other_text_is_refused(text):
    refuses(lambda: parse(text), "must read like", repr(text))


def test_an_object_of_the_background_s_colour_is_refused():
    refuses(lambda: complete(parse("a red ring on a red background"), iter([0.5] * 20)), "differ in colour")


@given(seeds)
def test_training_never_sees_a_held_out_combination(seed):
    assert not any(held_out(scene) for scene in sample_scenes(64, generator(seed)))


def test_the_evaluation_sees_nothing_else():
    scenes, mentioned = held_out_captions(256, seed=1)
    assert all(map(held_out, scenes)) and all(map(held_out, mentioned))


def test_about_a_tenth_is_held_out():
    # the control of the two tests above: scenes of every combination do contain held-out ones
    assert 0.08 < len(HELD_OUT) / (len(COLOURS) * len(SHAPES) * (len(COLOURS) - 1)) < 0.13
    share = sum(map(held_out, complete_scenes(1000, generator(0)))) / 1000
    assert 0.08 < share < 0.2


def test_every_colour_and_shape_is_trained_on():
    assert all(any(word not in c for c in HELD_OUT) for word in COLOURS + SHAPES)
    seen = {(t.colour, t.shape) for scene in sample_scenes(3000, generator(0)) for t in scene.things}
    assert len(seen) == len(COLOURS) * len(SHAPES)


def test_every_word_is_one_token_and_no_caption_is_cut():
    words = tokenizer()
    assert len(words) <= 256 and words.model_max_length == MAX_LENGTH
    assert len({tuple(words(word)["input_ids"]) for word in WORDS}) == len(WORDS)
    assert all(len(words(word)["input_ids"]) == 3 for word in WORDS)
    captions = [caption(scene) for scene in mention(complete_scenes(500, generator(3)), generator(4))]
    assert all(len(words(text)["input_ids"]) == 2 + len(text.split()) <= MAX_LENGTH for text in captions)
    assert tokens(words, captions).shape == (500, MAX_LENGTH)


def test_another_word_falls_back_to_characters():
    words = tokenizer()
    assert words.decode(words("a zebra")["input_ids"], skip_special_tokens=True).strip() == "a zebra"


def test_a_red_circle_is_red_in_the_middle_and_blue_in_the_corner():
    image = (draw([RED_CIRCLE])[0] + 1) / 2
    assert torch.allclose(image[:, 16, 16], torch.tensor([0.9, 0.1, 0.1]))
    assert torch.allclose(image[:, 0, 0], torch.tensor([0.1, 0.2, 0.9]))


def test_positions_and_order_are_as_said():
    corner = replace(RED_CIRCLE, things=(Thing("circle", "red", "large", "bottom right"),))
    pair = Scene((Thing("square", "red"), Thing("square", "green")), "white", "plain")
    red = draw([corner, pair])[:, 0] - draw([corner, pair])[:, 2] > 0.5
    columns, rows = red.any(1).float().argmax(1), red.any(2).float().argmax(1)
    assert columns[0] > 12 and rows[0] > 12, "the bottom right"
    assert columns[1] < 6, "the first of two objects is the left one"


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_circle_covers_its_area(size):
    cover = coverage(torch.tensor([0]), torch.tensor([[16.0, 16.0]]), torch.tensor([RADII[size]]))
    assert cover.sum() == pytest.approx(math.pi * RADII[size] ** 2, rel=0.01)


def test_drawings_repeat_with_the_seed_and_differ_without():
    scenes = complete_scenes(8, generator(0))
    assert torch.equal(draw(scenes, generator(1)), draw(scenes, generator(1)))
    assert not torch.equal(draw(scenes, generator(1)), draw(scenes, generator(2)))
    assert draw(scenes).abs().max() <= 1


def test_the_scorer_reads_drawings_of_combinations_never_trained_on():
    scenes, mentioned = held_out_captions(512, seed=2)
    measured = accuracies(draw(scenes, generator(3)), mentioned)
    # two objects in one of five pictures: every factor has 50 or more
    assert all(share["accuracy"] >= 0.95 for name, share in measured.items() if name != "all"), measured
    shuffled = accuracies(draw(scenes, generator(3)).roll(1, 0), mentioned)
    assert shuffled["all"]["accuracy"] < 0.1, "the control must fail"


def test_log_probability_prefers_the_right_caption_and_has_a_gradient():
    scenes, mentioned = held_out_captions(64, seed=3)
    captions = [caption(scene) for scene in mentioned]
    images = ((draw(scenes, generator(5)) + 1) / 2).requires_grad_()
    right = log_prob(images, captions)
    right.sum().backward()
    assert right.shape == (64,) and (right <= 0).all()
    assert images.grad.isfinite().all() and (images.grad.abs().amax((1, 2, 3)) > 0).all()
    wrong = log_prob(images.detach(), captions[1:] + captions[:1])
    assert (right.detach() > wrong).float().mean() > 0.9


def test_log_probability_is_the_sum_over_what_is_mentioned():
    image = (draw([RED_CIRCLE]) + 1) / 2
    logs = dict(zip(FACTORS, load_scorer()(2 * image - 1), strict=True))
    expected = logs["count"][0, 0] + logs["shape"][0, SHAPES.index("circle")] + logs["colour"][0, 0]
    assert log_prob(image, ["a red circle"]) == pytest.approx(float(expected), abs=1e-5)


def test_the_scorer_refuses_other_sizes():
    refuses(lambda: log_prob(torch.zeros(1, 3, 16, 16), ["a red circle"]), "(1, 3, 32, 32)", "(1, 3, 16, 16)")


def test_absent_factors_have_no_class():
    row = indices([parse("a red circle")])[0]
    named = [name for name, value in zip(FACTORS, row.tolist(), strict=True) if value != ABSENT]
    assert named == ["count", "shape", "colour"]


def test_the_scorer_is_small():
    assert WEIGHTS.stat().st_size <= 300_000
