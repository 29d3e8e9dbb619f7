"""The table of families: which classes it takes, which it refuses, and what a scheduler makes of a network."""

from __future__ import annotations

import diffusers
import pytest

from sdeblend import RectifiedFlow
from stablediffusion import pipeline_score, schedule_of
from stablediffusion.pipelines.families import FAMILIES, draws_from_text, family_of, paints_over, text_to_image
from stablediffusion.pipelines.inputs import call_guidance, guidance_weight, own_guidance
from stablediffusion.testing import FAMILIES as TINY
from stablediffusion.testing import tiny_pipeline

SCORED = [family for family in TINY if TINY[family].stem in FAMILIES]


def bare(kind):
    return kind.__new__(kind)


@pytest.mark.parametrize(("family", "task"), [(family, task) for family in SCORED for task in TINY[family].tasks])
def test_every_tiny_pipeline_has_its_row(family, task):
    pipe = tiny_pipeline(family, task)
    assert family_of(pipe) is FAMILIES[TINY[family].stem]
    assert paints_over(pipe) == (task == "inpaint" and family.startswith("sd") and family != "sd3")
    if task == "text2img":
        assert text_to_image(pipe, "it") is family_of(pipe)
    else:
        with pytest.raises(ValueError, match="it needs a text-to-image pipeline, got"):
            text_to_image(pipe, "it")


def test_a_subclass_is_of_its_family_and_a_family_without_a_row_is_refused():
    """FLUX.2 and Kontext begin like Flux, and are called otherwise."""
    assert family_of(bare(type("Mine", (diffusers.StableDiffusionXLPipeline,), {}))).stem == "StableDiffusionXL"
    assert family_of(bare(diffusers.StableDiffusionPAGPipeline)).stem == "StableDiffusion"
    for name in (
        "FluxKontext",
        "FluxFill",
        "QwenImageEdit",
        "ZImageOmni",
        "StableDiffusionUpscale",
        "HiDreamImage",
    ):
        with pytest.raises(ValueError, match=f"QwenImage, ZImage, got {name}Pipeline; attach a blend"):
            pipeline_score(bare(getattr(diffusers, f"{name}Pipeline")), "a")
    for name in ("StableDiffusionPAG", "FluxControl", "Flux2KleinInpaint", "QwenImageControlNet", "ZImageImg2Img"):
        with pytest.raises(ValueError, match=f"needs a text-to-image pipeline, got {name}Pipeline; attach a blend"):
            pipeline_score(bare(getattr(diffusers, f"{name}Pipeline")), "a")


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("StableDiffusionPAG", True), ("Flux2Klein", True), ("Chroma", True), ("HiDreamImage", True), ("Sana", True),
        ("FluxFill", False), ("FluxKontext", False), ("StableDiffusionXLImg2Img", False), ("Wan", False),
        ("QwenImageEdit", False), ("StableDiffusionLatentUpscale", False),
    ],
)  # fmt: skip
def test_what_draws_from_a_prompt_alone(name, fits):
    pipe = bare(getattr(diffusers, f"{name}Pipeline"))
    if name != "Wan":
        pipe.image_processor = None
    if fits:
        draws_from_text(pipe, "it")
    else:
        with pytest.raises(ValueError, match=f"it needs a text-to-image pipeline, got {name}Pipeline"):
            draws_from_text(pipe, "it")


# scale of classifier-free guidance, input of the network, g
GUIDANCE = {
    "sd15": (7.5, None, 7.5), "sd21": (7.5, None, 7.5), "sdxl": (5.0, None, 5.0), "sd3": (7.0, None, 7.0),
    "flux": (1.0, 3.5, 1.0), "flux2": (1.0, 4.0, 1.0), "flux2-klein": (4.0, None, 4.0), "qwen-image": (4.0, None, 4.0),
    "z-image": (5.0, None, 6.0),
}  # fmt: skip


@pytest.mark.parametrize("family", SCORED)
def test_guidance_is_the_familys_own(family):
    """Also of its Turbo, which only its name tells from it."""
    pipe, none = tiny_pipeline(family), 0.0 if family == "z-image" else 1.0
    scale, embedded, g = GUIDANCE[family]
    assert own_guidance(pipe) == (scale, embedded)
    assert (guidance_weight(pipe, None), guidance_weight(pipe, none), guidance_weight(pipe, none + 2)) == (g, 1.0, 3.0)
    if family == "flux2":  # its network takes guidance as an input
        assert call_guidance(pipe, None) == ({"guidance_scale": 4.0}, False)
        assert call_guidance(pipe, 3.0) == ({"guidance_scale": 3.0}, False)
    else:
        free = "true_cfg_scale" if family in ("flux", "qwen-image") else "guidance_scale"
        assert call_guidance(pipe, None) == ({free: scale}, scale != none)
        assert call_guidance(pipe, 3.0) == ({free: 3.0}, True)
    score = pipeline_score(pipe, "a", height=16, width=16)
    assert (score.guidance_scale, score.branches) == (scale, 1 if scale == none else 2)
    pipe.register_to_config(_name_or_path="someone/Model-Turbo")
    assert own_guidance(pipe)[0] == none


def test_models_that_take_guidance_otherwise_or_not_at_all():
    pipe = tiny_pipeline("flux2-klein")
    pipe.register_to_config(is_distilled=True)
    assert call_guidance(pipe, None) == ({"guidance_scale": 1.0}, False)
    for asks in (call_guidance, guidance_weight):
        with pytest.raises(ValueError, match="takes no guidance, got a scale of 3; leave it out"):
            asks(pipe, 3.0)
    pipe = tiny_pipeline("flux")
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert call_guidance(pipe, None) == ({"guidance_scale": 3.5}, False)
    assert call_guidance(pipe, 2.0) == ({"guidance_scale": 2.0}, False)
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="needs a UNet without guidance as an input"):
        pipeline_score(pipe, "a")


def test_flow_sigmas_make_a_flow_of_any_scheduler():
    pipe = tiny_pipeline("sd3")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    schedule, prediction = schedule_of(pipe)
    assert isinstance(schedule, RectifiedFlow) and prediction == "flow"
