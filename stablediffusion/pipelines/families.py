"""The families of text-to-image pipelines: the one place that looks at a pipeline's class.

A class is named by its family's stem, its tasks and "Pipeline", as StableDiffusionXL-Inpaint-Pipeline. Scores on
latents and tuning call the networks themselves, so they need what diffusers keeps inside each family's ``__call__``:
that is a row of ``FAMILIES``. An attached blend needs no row, it reads everything off the pipeline's own calls.

To add a family: a row here, and a row in ``stablediffusion.testing.families``, which brings it into the tests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablediffusion.pipelines.components import denoiser_of

# What a prompt becomes: "text" (tokens, width), and "pooled" (width,) where the family has it; no batch dimension, as
# lengths differ between prompts.
Text = Mapping[str, Tensor]
Size = tuple[int, int]
Arguments = dict[str, Any]

# What may stand between stem and "Pipeline"; any other word makes another family, which its own row must name.
_TASKS = re.compile("(PAG|Img2Img|Inpaint|ControlNet|Control|Union|XS|Adapter)*")


def _table(timestep: Tensor) -> Tensor:
    return timestep


@dataclass(frozen=True)
class Family:
    """How the networks of a family are called.

    Attributes:
        stem: what the names of its classes begin with.
        encode: (pipe, prompts) -> a ``Text`` each.
        event: (pipe, height and width in pixels) -> shape of one image's state.
        arguments: (pipe, a ``Text`` a row, size, embedded guidance) -> the denoiser's arguments besides state and time.
        latents: (pipe, clean states, size) -> what the autoencoder decodes.
        patch: the denoiser takes squares of latents of this side as one token.
        side: of an image in pixels by default; None where the pipeline or its denoiser says.
        unguided: the pipeline's guidance scale that is none; its scale less this, plus one, is g.
        time_name: the denoiser's argument; its state comes first.
        time: the scheduler's timestep -> the denoiser's time.
        listed: the denoiser takes and gives a list of rows, each (channels, 1, height, width).
        sign: of what the denoiser predicts.
        upcasts: the pipeline decodes in float32 where the autoencoder's configuration says that float16 overflows.
    """

    stem: str
    encode: Callable[[Any, list[str]], list[Text]]
    event: Callable[[Any, Size], tuple[int, ...]]
    arguments: Callable[[Any, Sequence[Text], Size, float | None], Arguments]
    latents: Callable[[Any, Tensor, Size], Tensor]
    patch: int = 1
    side: int | None = None
    unguided: float = 1.0
    time_name: str = "timestep"
    time: Callable[[Tensor], Tensor] = _table
    listed: bool = False
    sign: float = 1.0
    upcasts: bool = False

    def given(self, x: Tensor) -> Tensor:
        """Return states (..., *event) as the denoiser takes each."""
        return x.unsqueeze(-3) if self.listed else x

    def predicted(self, out: Tensor) -> Tensor:
        """Return what the denoiser gives for each state as the prediction (..., *event)."""
        return self.sign * (out.squeeze(-3) if self.listed else out)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, or of the pipeline that its class extends.

    Raises:
        ValueError: for another class.
    """
    return _row(pipe)[0]


def unguided(pipe: Any) -> float:
    """Return the guidance scale of a pipeline that is none; 1 of a class without a row."""
    try:
        return family_of(pipe).unguided
    except ValueError:
        return 1.0


def text_to_image(pipe: Any, what: str) -> Family:
    """Return the family of a text-to-image pipeline.

    Args:
        pipe: a pipeline.
        what: needs one, for messages.

    Raises:
        ValueError: another task, or another class.
    """
    family, tasks = _row(pipe)
    if tasks:
        raise ValueError(
            f"{what} needs a text-to-image pipeline, got {type(pipe).__name__}; attach a blend to it instead"
        )
    return family


def own_sigmas(pipe: Any, steps: int) -> np.ndarray | None:
    """Return the noise levels that a flow pipeline gives its scheduler, None if it leaves them to it.

    Raises:
        ValueError: for a pipeline without a row.
    """
    stem = family_of(pipe).stem
    if stem.startswith("StableDiffusion") or (stem.startswith("Flux") and pipe.scheduler.config.get("use_flow_sigmas")):
        return None
    return np.linspace(1.0, 1 / steps, steps)


def paints_over(pipe: Any) -> bool:
    """Return whether a pipeline replaces a part of the state after each step: inpainting by a plain denoiser."""
    return "Inpaint" in type(pipe).__name__ and denoiser_of(pipe)[1].config.in_channels == 4


def draws_from_text(pipe: Any, what: str) -> None:
    """Check that a pipeline makes images of a prompt alone, whatever its family.

    Args:
        pipe: a pipeline.
        what: needs one, for messages.

    Raises:
        ValueError: if it starts from an image, or makes a video or sound.
    """
    try:
        fits = _row(pipe)[1] in ("", "PAG")
    except ValueError:
        known = call_parameters(pipe)
        fits = "prompt" in known and hasattr(pipe, "image_processor")
        fits = fits and not any(re.fullmatch("(mask_|control_|input_)?images?|.*video.*", name) for name in known)
    if not fits:
        raise ValueError(
            f"{what} needs a text-to-image pipeline, got {type(pipe).__name__}; attach a blend to it instead"
        )


def call_parameters(pipe: Any) -> Mapping[str, Any]:
    """Return the defaults of the arguments of a pipeline's call by name, None where there is none."""
    found = inspect.signature(type(pipe).__call__).parameters.values()
    return {each.name: None if each.default is each.empty else each.default for each in found}


def _row(pipe: Any) -> tuple[Family, str]:
    for name in (kind.__name__ for kind in type(pipe).__mro__):
        for stem, family in FAMILIES.items():
            tasks = name.removeprefix(stem).removesuffix("Pipeline")
            if name == f"{stem}{tasks}Pipeline" and _TASKS.fullmatch(tasks):
                return family, tasks
    raise ValueError(
        f"a score on latents or tuning needs a text-to-image pipeline of {', '.join(FAMILIES)}, got "
        f"{type(pipe).__name__}; attach a blend to it instead"
    )


def _texts(**rows: Tensor | None) -> list[Text]:
    """Return a ``Text`` a row of these batches."""
    parts = {name: batch.unbind() for name, batch in rows.items() if batch is not None}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]


def _batch(texts: Sequence[Text], name: str = "text") -> Tensor:
    return torch.stack([text[name] for text in texts])


def _length(pipe: Any, tokenizer: Any) -> int:
    """Return how many tokens a pipeline cuts prompts to."""
    longest = int(call_parameters(pipe)["max_sequence_length"])
    # SD 3 can be without this tokenizer; FLUX.2's is a processor, which says nothing of it
    return min(longest, getattr(tokenizer, "model_max_length", longest))


def _encode(pipe: Any, prompts: list[str], **more: Any) -> list[Text]:
    found = pipe.encode_prompt(
        prompt=prompts,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        **more,
    )
    return _texts(text=found[0], pooled=found[2] if len(found) == 4 else None)


def _sd3_encode(pipe: Any, prompts: list[str]) -> list[Text]:
    length = _length(pipe, pipe.tokenizer_3)
    return _encode(pipe, prompts, prompt_2=None, prompt_3=None, max_sequence_length=length)


def _flux_encode(pipe: Any, prompts: list[str]) -> list[Text]:
    length = _length(pipe, pipe.tokenizer_2)
    text, pooled, _ = pipe.encode_prompt(prompts, None, pipe._execution_device, max_sequence_length=length)
    return _texts(text=text, pooled=pooled)


def _flux2_encode(pipe: Any, prompts: list[str]) -> list[Text]:
    return _texts(text=pipe.encode_prompt(prompts, max_sequence_length=_length(pipe, pipe.tokenizer))[0])


def _qwen_encode(pipe: Any, prompts: list[str]) -> list[Text]:
    # padded to the longest of these prompts, with a mask unless all are as long
    text, mask = pipe.encode_prompt(prompts, max_sequence_length=_length(pipe, pipe.tokenizer))
    kept = torch.ones_like(text[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    return [{"text": row[keep]} for row, keep in zip(text, kept, strict=True)]


def _z_encode(pipe: Any, prompts: list[str]) -> list[Text]:
    length = _length(pipe, pipe.tokenizer)
    # the pipeline writes its template into the list that it is given
    found, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
    return [{"text": text} for text in found]


def _latent_event(pipe: Any, size: Size) -> tuple[int, ...]:
    channels, scale = denoiser_of(pipe)[1].config.in_channels, pipe.vae_scale_factor
    return channels, size[0] // scale, size[1] // scale


def _grid(pipe: Any, size: Size) -> Size:
    """Return how many tokens of 2 x 2 latents an image is high and wide."""
    tall, wide = (length // (2 * pipe.vae_scale_factor) for length in size)
    return tall, wide


def _packed_event(pipe: Any, size: Size) -> tuple[int, ...]:
    tall, wide = _grid(pipe, size)
    return tall * wide, denoiser_of(pipe)[1].config.in_channels


def _embedded(pipe: Any, rows: int, guidance: float | None) -> Arguments:
    """Return the guidance that a network takes as input, if it does."""
    if not denoiser_of(pipe)[1].config.guidance_embeds:
        return {}
    if guidance is None:
        raise ValueError(f"{type(pipe).__name__} takes guidance as an input of its denoiser; give embedded_guidance")
    return {"guidance": torch.full((rows,), guidance, device=pipe._execution_device, dtype=torch.float32)}


def _sd_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    if denoiser_of(pipe)[1].config.time_cond_proj_dim is not None:
        raise ValueError(
            f"a score on latents or tuning needs a UNet without guidance as an input, got one of {type(pipe).__name__} "
            "with time_cond_proj_dim; attach a blend to it instead"
        )
    return {"encoder_hidden_states": _batch(texts)}


def _sdxl_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    width, dtype = pipe.text_encoder_2.config.projection_dim, denoiser_of(pipe)[1].dtype
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype, text_encoder_projection_dim=width)
    ids = ids.to(pipe._execution_device).repeat(len(texts), 1)
    added = {"text_embeds": _batch(texts, "pooled"), "time_ids": ids}
    return _sd_arguments(pipe, texts, size, guidance) | {"added_cond_kwargs": added}


def _sd3_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    return {"encoder_hidden_states": _batch(texts), "pooled_projections": _batch(texts, "pooled")}


def _flux_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    text, dtype, device = _batch(texts), denoiser_of(pipe)[1].dtype, pipe._execution_device
    return {
        "encoder_hidden_states": text,
        "pooled_projections": _batch(texts, "pooled"),
        "img_ids": pipe._prepare_latent_image_ids(len(texts), *_grid(pipe, size), device, dtype),
        "txt_ids": torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
        **_embedded(pipe, len(texts), guidance),
    }


def _flux2_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    text, device = _batch(texts), pipe._execution_device
    return {
        "encoder_hidden_states": text,
        "img_ids": pipe._prepare_latent_ids(text.new_empty(len(texts), 1, *_grid(pipe, size))).to(device),
        "txt_ids": pipe._prepare_text_ids(text).to(device),
        **_embedded(pipe, len(texts), guidance),
    }


def _qwen_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    rows = [text["text"] for text in texts]
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=rows[0].device) < lengths[:, None]
    return {
        "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "img_shapes": [[(1, *_grid(pipe, size))]] * len(rows),
        **_embedded(pipe, len(rows), guidance),
    }


def _z_arguments(pipe: Any, texts: Sequence[Text], size: Size, guidance: float | None) -> Arguments:
    return {"cap_feats": [text["text"] for text in texts]}


def _scaled(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    return latents / pipe.vae.config.scaling_factor


def _sdxl_latents(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    config = pipe.vae.config
    if config.latents_mean is None or config.latents_std is None:
        return _scaled(pipe, latents, size)
    mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std))
    return latents * std / config.scaling_factor + mean


def _shifted(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    return _scaled(pipe, latents, size) + pipe.vae.config.shift_factor


def _flux_latents(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    return _shifted(pipe, pipe._unpack_latents(latents, *size, pipe.vae_scale_factor), size)


def _flux2_latents(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    norm = pipe.vae.bn
    mean, variance = (value.view(1, -1, 1, 1).to(latents) for value in (norm.running_mean, norm.running_var))
    patches = latents.transpose(1, 2).unflatten(2, _grid(pipe, size))
    return pipe._unpatchify_latents(patches * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean)


def _qwen_latents(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    config = pipe.vae.config
    mean, std = (latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return pipe._unpack_latents(latents, *size, pipe.vae_scale_factor) / (1 / std) + mean


def _unit(timestep: Tensor) -> Tensor:
    return timestep / 1000


def _backwards(timestep: Tensor) -> Tensor:
    return (1000 - timestep) / 1000


FAMILIES = {
    family.stem: family
    for family in (
        Family("StableDiffusion", _encode, _latent_event, _sd_arguments, _scaled),
        Family("StableDiffusionXL", _encode, _latent_event, _sdxl_arguments, _sdxl_latents, upcasts=True),
        Family("StableDiffusion3", _sd3_encode, _latent_event, _sd3_arguments, _shifted, patch=2),
        Family("Flux", _flux_encode, _packed_event, _flux_arguments, _flux_latents, patch=2, time=_unit),
        Family("Flux2", _flux2_encode, _packed_event, _flux2_arguments, _flux2_latents, patch=2, time=_unit),
        Family("Flux2Klein", _flux2_encode, _packed_event, _flux2_arguments, _flux2_latents, patch=2, time=_unit),
        Family("QwenImage", _qwen_encode, _packed_event, _qwen_arguments, _qwen_latents, patch=2, time=_unit),
        Family(
            "ZImage", _z_encode, _latent_event, _z_arguments, _shifted,
            patch=2, side=1024, unguided=0.0, time_name="t", time=_backwards, listed=True, sign=-1.0,
        ),
    )
}  # fmt: skip
