"""The table of families: which classes it takes, which it refuses, and what a scheduler makes of a network."""

from __future__ import annotations

import diffusers
import pytest

from sdeblend import RectifiedFlow
from stablediffusion import pipeline_score, schedule_of
from stablediffusion.pipelines.families import FAMILIES, family_of, paints_over, text_to_image
from stablediffusion.testing import FAMILIES as TINY
from stablediffusion.testing import tiny_pipeline

SCORED = [family for family in TINY if TINY[family].stem in FAMILIES]


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

    def bare(kind):
        return kind.__new__(kind)

    assert family_of(bare(type("Mine", (diffusers.StableDiffusionXLPipeline,), {}))).stem == "StableDiffusionXL"
    assert family_of(bare(diffusers.StableDiffusionPAGPipeline)).stem == "StableDiffusion"
    for name in ("Flux2Pipeline", "FluxKontextPipeline", "QwenImagePipeline", "StableDiffusionUpscalePipeline"):
        with pytest.raises(ValueError, match=f"StableDiffusion3, Flux, got {name}; attach a blend"):
            pipeline_score(bare(getattr(diffusers, name)), "a")


def test_flow_sigmas_make_a_flow_of_any_scheduler():
    pipe = tiny_pipeline("sd3")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    schedule, prediction = schedule_of(pipe)
    assert isinstance(schedule, RectifiedFlow) and prediction == "flow"
