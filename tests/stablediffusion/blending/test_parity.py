"""The attached blend against an independent rewriting of the published algorithm, on the families that it knows."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch

from sdeblend import Preference
from stablediffusion import blend, load_members
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support import sd_reference as reference

FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "flux")
PROMPT, NEGATIVE = "a red circle", "blue"
# By number of members; each set has a negative weight and leaves some of one to the base.
WEIGHTS = {
    2: [0.9, -0.3],
    3: [1.2, -0.5, 0.1],
    10: [0.4, -0.2, 0.1, 0.3, -0.1, 0.2, 0.1, -0.3, 0.2, 0.1],
}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return (family, dtype) -> a pipeline, its LoRA files and copies of its network, the base and one a file fused."""

    @functools.cache
    def make(family, dtype):
        pipe = tiny_pipeline(family, seed=3, dtype=dtype)
        folder = tmp_path_factory.mktemp(family)
        paths = {f"m{i}": folder / f"{i}.safetensors" for i in range(10)}
        for i, path in enumerate(paths.values()):
            tiny_lora(pipe, path, seed=i + 1, scale=0.3, alpha=6)
        name = "transformer" if hasattr(pipe, "transformer") else "unet"
        base = getattr(pipe, name)
        return pipe, paths, [copy.deepcopy(base), *(reference.fused(base, path, name) for path in paths.values())]

    return make


def compare(model, weights, *, steps=50, guidance=7.5, strength=1.0, batched=False, reference_weights=None):
    """Return the relative error of the attached blend; other weights for the reference make a control."""
    pipe, every_path, every_network = model
    family, dtype = type(pipe).__name__, every_network[0].dtype
    paths, networks = dict(list(every_path.items())[: len(weights)]), every_network[: 1 + len(weights)]
    prompts = [reference.encode(pipe, PROMPT, NEGATIVE, guidance > 1)] * len(networks)
    flow = family.startswith(("Flux", "StableDiffusion3"))
    call = tiny_call(pipe, steps) | {"output_type": "latent", "negative_prompt": NEGATIVE}
    shape = (1, 16, 16) if family.startswith("Flux") else (1, 16 if flow else 4, 8, 8)
    call["latents"] = torch.randn(shape, generator=seeded(), dtype=dtype)
    call["true_cfg_scale" if family.startswith("Flux") else "guidance_scale"] = guidance
    if not flow:
        call["eta"] = 1.0
    named = dict(zip(paths, reference_weights or weights, strict=True))
    expected = reference.published(
        pipe,
        networks,
        prompts,
        Preference(named, strength).coefficients().tolist(),
        call["latents"],
        steps=steps,
        guidance=guidance,
        negative=NEGATIVE,
        generator=seeded(7),
    )
    members = load_members(pipe, paths)
    try:
        preference = Preference(dict(zip(paths, weights, strict=True)), strength)
        with blend(pipe, members, preference, batched=batched) as knobs:
            got = pipe(PROMPT, generator=seeded(7), **call).images
    finally:
        members.remove()
    assert knobs.calls >= steps
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_published_algorithm_over_fifty_steps(family, dtype, models):
    steps = 20 if family == "sd21" else 50  # in all but its prediction type as sd15
    assert compare(models(family, dtype), WEIGHTS[2], steps=steps) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("members", [3, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_algorithm_with_more_members(family, members, dtype, models):
    steps = 50 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 3
    assert compare(models(family, dtype), WEIGHTS[members], steps=steps) < LIMITS[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_members_side_by_side(family, models):
    assert compare(models(family, torch.float64), WEIGHTS[10], steps=2, batched=True) < 1e-10


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_differ(family, dtype, models):
    """The control: a weight of one part in a thousand more is told apart, in either precision."""
    error = compare(models(family, dtype), [0.9, -0.3], steps=3, reference_weights=[0.901, -0.3])
    assert error > 3 * LIMITS[dtype]


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(
    ("weights", "strength"), [([1.4, -0.4, 0.0], 1.0), ([0.3, 0.5, 0.2], 1.3), ([0.2, 0.1, 0.3], 0.5)]
)
def test_strength_zero_weights_and_no_guidance(weights, strength, guidance, models):
    model = models("sd15", torch.float64)
    assert compare(model, weights, steps=4, strength=strength, guidance=guidance) < 1e-10
