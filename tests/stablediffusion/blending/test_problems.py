"""Images are particles of one problem if their inputs are the same, in every way an image can have an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stablediffusion
from stablediffusion import load_members
from stablediffusion.blending.problems import same_problem
from stablediffusion.testing import tiny_call, tiny_image, tiny_lora, tiny_mask, tiny_pipeline

blend: Any = stablediffusion.blend
ONE = torch.tensor([0.5, 0.5], dtype=torch.float64)


def test_groups_are_numbered_in_order_of_appearance():
    text = torch.tensor([[1.0], [2.0], [1.0], [1.0 + 1e-7], [2.1]])
    assert same_problem([text], ONE, 5).tolist() == [0, 1, 0, 0, 2]
    # branches in front; integers; nothing to tell apart
    assert same_problem([torch.cat([torch.zeros(5, 1), text])], ONE, 5).tolist() == [0, 1, 0, 0, 2]
    assert same_problem([torch.tensor([3, 3, 4])], ONE, 3).tolist() == [0, 0, 1]
    assert same_problem([torch.ones(1, 7), torch.tensor(2.0)], ONE, 3).tolist() == [0, 0, 0]
    # two pictures for four images: repeated as a b a b or a a b b, nobody can say
    assert same_problem([torch.tensor([[1.0], [2.0]])], ONE, 4).tolist() == [0, 1, 2, 3]
    assert same_problem([torch.tensor([[1.0], [1.0]])], ONE, 4).tolist() == [0, 0, 0, 0]
    assert same_problem([torch.tensor([[1.0], [2.0], [3.0]])], ONE, 4).tolist() == [0, 1, 2, 3]
    weights = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    assert same_problem([torch.ones(3, 2)], weights, 3).tolist() == [0, 1, 0]
    half = torch.tensor([[1.0], [1.004], [1.1]], dtype=torch.bfloat16)
    assert same_problem([half], ONE, 3).tolist() == [0, 0, 1]


def count(pipe, members, prompt, **options):
    """Return how many problems a run's images are."""
    call = tiny_call(pipe, 3) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0), "eta": 1.0}
    with blend(pipe, members, {"a": 0.5}) as knobs:
        pipe(prompt, **(call | options))
    assert knobs.reason is None
    return len(knobs.certificates)


def mask(width):
    pixels = tiny_mask().copy()
    pixels.paste(0, (0, 0, 16 - width, 16))
    return pixels


@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint9", "controlnet"])
def test_own_prompts_and_pictures_are_own_problems(task, tmp_path):
    pipe = tiny_pipeline("sd15", task)
    members = load_members(pipe, {"a": tiny_lora(pipe, tmp_path / "a.safetensors", seed=1, scale=0.3)})
    two = [tiny_image(0), tiny_image(1)]
    assert count(pipe, members, ["a", "b"]) == 2
    assert count(pipe, members, "a", num_images_per_prompt=2) == 1
    if task != "inpaint9":  # each picture is encoded with noise of its own there
        pictures = {} if task == "text2img" else {"image": [two[0], two[0]]}
        assert count(pipe, members, ["a", "a"], **pictures) == 1
    if task != "text2img":
        assert count(pipe, members, ["a", "a"], image=two) == 2
    if task == "inpaint9":
        assert count(pipe, members, ["a", "a"], image=[two[0]] * 2, mask_image=[mask(4), mask(8)]) == 2
    if task == "text2img":
        assert count(pipe, members, ["a", "a"], negative_prompt=["b", "c"]) == 2
        assert count(pipe, members, ["a", "a"], guidance_scale=1.0) == 1


def test_a_prompt_with_sizes_of_its_own(tmp_path):
    """Embeddings given, alike up to rounding or not."""
    pipe = tiny_pipeline("sd15")
    members = load_members(pipe, {"a": tiny_lora(pipe, tmp_path / "a.safetensors", seed=1, scale=0.3)})
    text = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0))
    for change, problems in ((1e-7, 1), (1e-2, 2)):
        both = torch.cat([text, text * (1 + change)])
        assert count(pipe, members, None, prompt_embeds=both, negative_prompt_embeds=both.flip(0) * 0) == problems
