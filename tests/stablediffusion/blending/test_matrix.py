"""Every family of tiny pipelines, with and without guidance, one image and two: blends against an oracle."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import stablediffusion
from stablediffusion import load_members
from stablediffusion.testing import FAMILIES, tiny_call, tiny_lora, tiny_pipeline
from tests.support.averages import Oracle

blend: Any = stablediffusion.blend  # its draws are looked into here
STEPS = 2
PROMPTS, NEGATIVES = ["a red circle", "blue ring"], ["green", "a"]
WEIGHTS, OTHER = {"a": 0.7, "b": -0.4}, {"a": 0.7, "b": -0.41}
EACH = {"a": torch.tensor([0.9, -0.2], dtype=torch.float64), "b": torch.tensor([-0.3, 0.5], dtype=torch.float64)}
DRAWN = {"a": 0.3, "b": 0.4}
# relative to what the blend changes: networks are in float64, but schedulers step in float32
LIMIT = 1e-4


@dataclass(frozen=True)
class Row:
    """A row of the matrix.

    Attributes:
        family: of tiny pipelines.
        plain, guided: rows an image and step without guidance and with it.
        options: of calls with guidance.
        because: why guidance takes no row more, where it does not.
        tied: why members side by side cannot be right, where they cannot; the blend says so and is exact all the same.
    """

    family: str
    plain: int = 1
    guided: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    because: str = ""
    tied: str = ""


_CHUNKED = "its attention takes the last third of a batch, or half, for the perturbed rows"
_SKIPPED = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
ROWS = {name: Row(name) for name in FAMILIES} | {
    "sd15-pag": Row("sd15-pag", 2, 3, tied=_CHUNKED),
    "sdxl-pag": Row("sdxl-pag", 2, 3, tied=_CHUNKED),
    "sd3-skip-layer": Row("sd3", 1, 3, _SKIPPED),
    "hidream": Row("hidream", tied="prompt embeddings have the layers of a language model in front of the batch"),
    "flux2": Row("flux2", 1, 1, because="it is distilled, and the scale of guidance an input of the network"),
}


class Cell:
    """One row, with or without guidance, for a number of images."""

    def __init__(self, pipe, row, guided, images):
        self.pipe, self.images, self.tied = pipe, images, row.tied
        self.branches = row.guided if guided else row.plain
        known = inspect.signature(pipe.__call__).parameters
        scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
        self.options = tiny_call(pipe, STEPS) | {"output_type": "latent", scale: 3.0 if guided else 0.0}
        self.options |= {"prompt": PROMPTS[:images]} | (row.options if guided else {})
        if "sigmas" in known and "sigmas" in inspect.signature(pipe.scheduler.set_timesteps).parameters:
            self.options["sigmas"] = [1.0, 0.5]  # some have a grid of their own whose last step is next to nothing
        if guided and "negative_prompt" in known:
            self.options["negative_prompt"] = NEGATIVES[:images]

    def __call__(self):
        own = {name: copy.copy(value) for name, value in self.options.items()}  # Z-Image writes into a list of prompts
        return self.pipe(**own, generator=torch.Generator().manual_seed(5))[0]


def coefficients(weights):
    """Return the weights of base and members, (K,) or (B, K)."""
    members = torch.stack([torch.as_tensor(w, dtype=torch.float64) for w in weights.values()], -1)
    return torch.cat([1 - members.sum(-1, keepdim=True), members], -1)


@pytest.mark.parametrize("name", ROWS)
def test_matrix(name, tmp_path):
    row = ROWS[name]
    pipe = tiny_pipeline(row.family, seed=1, dtype=torch.float64)
    paths = {
        m: tiny_lora(pipe, tmp_path / f"{m}.safetensors", seed=k + 2, scale=3.0, alpha=6) for k, m in enumerate("ab")
    }
    oracle = Oracle(pipe, paths.values())
    members = load_members(pipe, paths)
    wrong = {}
    for guided, images in itertools.product((False, True), (1, 2)):
        cell = Cell(pipe, row, guided, images)
        for way, error in errors(cell, oracle, members):
            if not error < LIMIT:
                wrong[f"{'guided' if guided else 'plain'}, {images} images, {way}"] = error
    assert not wrong


def errors(cell, oracle, members):
    """Yield the error of each way to blend, relative to what the blend changes."""
    base, single = cell(), [1.0]
    alone = {name: [oracle.alone(name, k) for k in range(3)] for name in oracle.networks}

    def expected(networks, weights):
        value = oracle(cell, networks, weights)
        assert sum(map(sum, oracle.rows.values())) == STEPS * cell.images * cell.branches, oracle.rows
        assert (value - base).norm() > 1e-3 * base.norm(), "the blend has no effect"
        return value

    def error(value, preference, **options):
        with blend(cell.pipe, members, preference, **options) as knobs:
            got = cell()
        if value is None:
            drawn = knobs._engine.run.serving.long()
            assert len(drawn.unique()) > 1 and (cell.images == 1 or bool((drawn[:, 0] != drawn[:, 1]).all()))
            one = torch.eye(3, dtype=torch.float64)[drawn]
            value = expected(alone, lambda step: one[step])
        return float((got - value).norm() / (value - base).norm())

    def all_at_once(way, preference):
        weights = coefficients(preference)
        value = expected(alone, lambda step: weights)
        if cell.images == 1:  # the control: one part in a hundred more of one member is told apart
            other = expected(alone, lambda step: coefficients(OTHER))
            assert (value - other).norm() > 10 * LIMIT * (value - base).norm()
        yield way, error(value, preference)
        with pytest.warns(UserWarning, match="ties the rows") if cell.tied else contextlib.nullcontext():
            found = error(value, preference, batched=True)
        yield f"{way}, batched", found

    yield from all_at_once("mpa", WEIGHTS)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore" if cell.tied else "error", "images with members of their own cost a whole batch"
        )
        found = error(None, DRAWN, mode="ls", seed=4)
    yield "ls", found
    if cell.images == 2:
        yield from all_at_once("weights an image", EACH)
        networks = {name: networks[1:2] for name, networks in alone.items()}
        yield "ls, one member", error(expected(networks, lambda step: single), {"a": 1.0}, mode="ls")
        return
    shares = list(WEIGHTS.values())
    for mode, made in (("soup", oracle.soup), ("soup-factors", oracle.soup_of_factors)):
        networks = {name: [made(name, shares)] for name in alone}
        yield mode, error(expected(networks, lambda step: single), WEIGHTS, mode=mode)
