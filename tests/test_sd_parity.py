"""The attached blend against an independent rewriting of the published algorithm, on every family."""

from __future__ import annotations

import pytest
import torch

from sdeblend import Preference
from stablediffusion import blend, load_members
from stablediffusion.testing import FAMILIES, tiny_call, tiny_lora, tiny_pipeline
from tests import sd_reference as reference

PROMPT, NEGATIVE = "a red circle", "blue"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def two_loras(pipe, folder, count=2, scale=0.3, **options):
    paths = {f"m{i}": folder / f"{i}.safetensors" for i in range(count)}
    for i, path in enumerate(paths.values()):
        tiny_lora(pipe, path, seed=i + 1, scale=scale, alpha=6, **options)
    return paths


def compare(family, dtype, folder, weights, *, steps=50, guidance=7.5, strength=1.0, batched=False, other=None):
    """Return the relative error of the attached blend; ``other`` are wrong weights to compare with instead."""
    pipe = tiny_pipeline(family, seed=3, dtype=dtype)
    paths = two_loras(pipe, folder, len(weights))
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    base = getattr(pipe, name)
    networks = [base, *(reference.fused(base, path, name) for path in paths.values())]
    prompts = [reference.encode(pipe, PROMPT, NEGATIVE, guidance > 1)] * len(networks)
    call = tiny_call(pipe, steps) | {"output_type": "latent", "negative_prompt": NEGATIVE}
    shape = {"flux": (1, 16, 16), "sd3": (1, 16, 8, 8)}.get(family, (1, 4, 8, 8))
    call["latents"] = torch.randn(shape, generator=seeded(), dtype=dtype)
    call["true_cfg_scale" if family == "flux" else "guidance_scale"] = guidance
    if family in ("sd15", "sd21", "sdxl"):
        call["eta"] = 1.0
    expected = reference.published(
        pipe,
        networks,
        prompts,
        Preference(dict(zip(paths, other or weights, strict=True)), strength).coefficients().tolist(),
        call["latents"],
        steps=steps,
        guidance=guidance,
        negative=NEGATIVE,
        generator=seeded(7),
    )
    members = load_members(pipe, paths)
    with blend(pipe, members, Preference(dict(zip(paths, weights, strict=True)), strength), batched=batched) as knobs:
        got = pipe(PROMPT, generator=seeded(7), **call).images
    assert knobs.calls >= steps
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_published_algorithm_in_float64(family, tmp_path):
    assert compare(family, torch.float64, tmp_path, [0.7, 0.3]) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_published_algorithm_in_float32(family, tmp_path):
    assert compare(family, torch.float32, tmp_path, [0.7, 0.3]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_members_side_by_side(family, tmp_path):
    assert compare(family, torch.float64, tmp_path, [0.7, 0.3, 0.1], steps=6, batched=True) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_differ(family, tmp_path):
    """The control: weights five per cent off are told apart."""
    assert compare(family, torch.float64, tmp_path, [0.7, 0.3], steps=6, other=[0.65, 0.35]) > 1e-7


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(
    ("weights", "strength"),
    [([1.4, -0.4, 0.0], 1.0), ([0.3, 0.5, 0.2], 1.3), ([0.2, 0.1, 0.3], 0.5), ([0.1] * 10, 1.2)],
)
def test_negative_weights_base_and_ten_members(weights, strength, guidance, tmp_path):
    error = compare("sd15", torch.float64, tmp_path, weights, steps=8, strength=strength, guidance=guidance)
    assert error < 1e-10
