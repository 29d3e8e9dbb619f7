"""A pipeline's base and members as a ``ScoreStack`` on latents: the core's solver samples Stable Diffusion.

    stack = pipeline_score(pipe, "a red circle", guidance_scale=7.5, members=members)
    sde = BackwardSDE(stack.schedule, Blend(stack, preference))
    solution = solve(sde, stack.prior(generator), time_grid(stack.schedule, 50), noise=generator, correct="certify")
    images = stack.decode(solution.samples)

Each member is guided by itself, S = S_neg + g (S_pos - S_neg), and converted from what the network predicts to a
score; with coefficients that sum to one the order does not matter. For flow models (SD 3, Flux) the score comes from
the velocity: the same marginals, sampled by an SDE where the pipeline itself follows the ODE. The state is
float32 or float64 whatever the network's dtype.

Source: Ho and Salimans 2207.12598 (guidance); Diffusion Blend 2505.18547, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.score import conversion
from stablediffusion.components import denoiser_of
from stablediffusion.denoiser import DenoiserStack
from stablediffusion.members import Members
from stablediffusion.schedulers import schedule_of, timestep_of


class PipelineScore:
    """Scores of a pipeline's base (member 0) and members on latents, with guidance; see ``pipeline_score``.

    Attributes:
        schedule: the forward process the network was trained on.
        prediction: what the network predicts: "eps", "v", "x0" or "flow".
        names: the members' names, the order of the stack after the base.
        shape: of the state, (B, *event); Flux packs its latents into (B, tokens, channels).
    """

    def __init__(
        self,
        pipe: Any,
        members: Members,
        prompts: Sequence[str],
        negatives: Sequence[str],
        images: int,
        guidance_scale: float,
        embedded_guidance: float,
        size: tuple[int, int],
        side_by_side: bool,
    ) -> None:
        self.pipe, self.members, self.guidance_scale, self.size = pipe, members, float(guidance_scale), size
        self.schedule, self.prediction = schedule_of(pipe)
        name, network = denoiser_of(pipe)
        self.dtype, self.device = network.dtype, pipe._execution_device
        self.branches = 1 if guidance_scale == 1 else 2
        self._flux = type(pipe).__name__.startswith("Flux")
        self._stack = DenoiserStack(network.forward, network, members, side_by_side=side_by_side)
        self._index: Tensor | None = None
        with torch.no_grad(), members.text_switch.borrowed() as switch:
            base = _encode(pipe, prompts, negatives, images, self.branches == 2)
            for member in members.text_members:
                switch.use(str(member.adapter))
                own = _encode(pipe, prompts, negatives, images, self.branches == 2)
                self._stack.embeddings.record(member.name, base, own)
        event, self._fixed = _conditions(pipe, name, base, size, self.branches, embedded_guidance)
        self.shape = (len(prompts) * images, *event)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in the order of the stack after the base."""
        return self.members.names

    def __len__(self) -> int:
        return len(self._stack)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        """Return the guided scores (K, B, *event) of base and members, or of those in ``active``.

        Args:
            x: latents (B, *event).
            t: time, 0-dim float64, t > 0.
            active: positions in the stack.
        """
        rows = self.branches * self.shape[0]
        value = float(t) if self._flux else float(timestep_of(self.schedule, t, self.pipe.scheduler))
        timestep = torch.full((rows,), value, dtype=torch.float32, device=x.device)
        # only the shape counts: the rows themselves come with x below
        placeholder = x.new_empty((1, *x.shape[1:]), dtype=self.dtype).expand(rows, *x.shape[1:])
        arguments = self._fixed | {self._stack.sample_name: placeholder, "timestep": timestep, "return_dict": False}
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad), self.members.switch.borrowed():
            self._stack.bind((), arguments, self.branches)
            stack = self._stack if self._index is None else self._stack.rows(self._index)
            branched = x.to(self.dtype).unsqueeze(1).expand(-1, self.branches, *x.shape[1:])
            out = stack(branched, t, active).to(x.dtype)
        value_of = out[:, :, 0]
        if self.branches == 2:
            value_of = value_of + self.guidance_scale * (out[:, :, 1] - value_of)
        p, q = conversion(self.schedule, t, self.prediction, "score")
        return float(p) * x + float(q) * value_of

    def rows(self, index: Tensor) -> PipelineScore:
        """Return the stack for the images ``index``."""
        part = object.__new__(PipelineScore)
        part.__dict__.update(self.__dict__)
        part._index = index if self._index is None else self._index[index]
        return part

    def prior(
        self, generator: torch.Generator | Sequence[torch.Generator], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw the start of a run at t_max, (B, *event); with one generator an image, whatever B is.

        Args:
            generator: one, or one an image.
            dtype: of the state, float32 or float64.
        """
        if isinstance(generator, torch.Generator):
            return self.schedule.prior(self.shape, generator=generator, dtype=dtype).to(self.device)
        if len(generator) != self.shape[0]:
            raise ValueError(f"{self.shape[0]} images need one generator or as many, got {len(generator)}")
        rows = [self.schedule.prior((1, *self.shape[1:]), generator=g, dtype=dtype) for g in generator]
        return torch.cat(rows).to(self.device)

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Return the images of latents.

        Args:
            latents: (B, *event) at t = 0.
            output_type: "pil" (a list), "np" (B, H, W, 3) in [0, 1] or "pt" (B, 3, H, W).
        """
        vae = self.pipe.vae
        if self._flux:
            latents = self.pipe._unpack_latents(latents, *self.size, self.pipe.vae_scale_factor)
        mean, std = (vae.config.get(f"latents_{what}") for what in ("mean", "std"))
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(std).view(shape) / vae.config.scaling_factor
            latents = latents + latents.new_tensor(mean).view(shape)
        else:
            latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        dtype = vae.dtype
        upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
        try:
            if upcast:
                vae.to(torch.float32)
            with torch.no_grad():
                image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype)
        return self.pipe.image_processor.postprocess(image, output_type=output_type)


def pipeline_score(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    members: Members | None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str | Sequence[str] = "",
    images: int = 1,
    embedded_guidance: float = 3.5,
    height: int | None = None,
    width: int | None = None,
    batched: bool | None = None,
) -> PipelineScore:
    """Return a text-to-image pipeline's base and members as scores on latents.

    Args:
        pipe: SD 1.5, SD 2.1, SDXL, SD 3 or Flux, text to image.
        prompt: one, or several.
        members: what ``load_members`` returned; None for the base alone.
        guidance_scale: g of classifier-free guidance; 1 is none, at half the cost.
        negative_prompt: one, or one a prompt.
        images: per prompt; the batch is prompts times images.
        embedded_guidance: what a guidance-distilled Flux takes as input.
        height, width: of the images in pixels; the model's own by default.
        batched: adapters side by side in one pass; by default on a CUDA device only.

    Returns:
        a ``ScoreStack`` with ``schedule``, ``names``, ``shape``, ``prior`` and ``decode``. Its names let ``Blend`` and
        ``OneMemberPerStep`` weigh it by a ``Preference``, in any order.

    Raises:
        ValueError: another task, prompts and negative prompts that do not match, or members that cannot run.
    """
    if any(word in type(pipe).__name__ for word in ("Img2Img", "Inpaint", "ControlNet", "Control")):
        raise ValueError(
            f"scores on latents need a text-to-image pipeline, got {type(pipe).__name__}; attach a blend to it instead"
        )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if not prompts or len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need one negative prompt or as many, got {len(negatives)}")
    if images < 1:
        raise ValueError(f"a prompt needs at least one image, got {images}")
    network = denoiser_of(pipe)[1]
    chosen = (members or Members(pipe, {})).on(pipe)
    if batched is None:
        batched = len(chosen) > 0 and next(network.parameters()).is_cuda and chosen.adapters_only
    side = getattr(pipe, "default_sample_size", None) or network.config.sample_size
    size = (height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor)
    return PipelineScore(
        pipe, chosen, prompts, negatives, images, guidance_scale, embedded_guidance, size, bool(batched)
    )


def _encode(
    pipe: Any, prompts: Sequence[str], negatives: Sequence[str], images: int, guided: bool
) -> tuple[Tensor | None, ...]:
    """Return (positive, negative, pooled positive, pooled negative) embeddings, None where there is none."""
    name, device = type(pipe).__name__, pipe._execution_device
    if name.startswith("Flux"):
        length = min(512, pipe.tokenizer_2.model_max_length)
        both = [
            pipe.encode_prompt(list(texts), None, device, images, max_sequence_length=length)
            for texts in ((prompts, negatives) if guided else (prompts,))
        ]
        positive, negative = both[0], both[-1] if guided else (None, None)
        return positive[0], negative[0], positive[1], negative[1]
    arguments = {
        "prompt": list(prompts),
        "device": device,
        "num_images_per_prompt": images,
        "do_classifier_free_guidance": guided,
        "negative_prompt": list(negatives) if guided else None,
    }
    if name.startswith("StableDiffusion3"):
        length = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.model_max_length)
        return pipe.encode_prompt(prompt_2=None, prompt_3=None, max_sequence_length=length, **arguments)
    out = pipe.encode_prompt(**arguments)
    return out if len(out) == 4 else (*out, None, None)


def _conditions(
    pipe: Any,
    network_name: str,
    embeddings: tuple[Tensor | None, ...],
    size: tuple[int, int],
    branches: int,
    embedded_guidance: float,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of one image's state, and the denoiser's arguments that do not change over a run."""
    positive, negative, pooled, negative_pooled = embeddings
    network, scale = getattr(pipe, network_name), pipe.vae_scale_factor

    def both(minus: Tensor | None, plus: Tensor | None) -> Tensor:
        return torch.cat([part for part in (minus if branches == 2 else None, plus) if part is not None])

    fixed: dict[str, Any] = {"encoder_hidden_states": both(negative, positive)}
    rows, device, dtype = len(fixed["encoder_hidden_states"]), pipe._execution_device, network.dtype
    if type(pipe).__name__.startswith("Flux"):
        tall, wide = (2 * (length // (scale * 2)) for length in size)
        fixed["pooled_projections"] = both(negative_pooled, pooled)
        fixed["img_ids"] = pipe._prepare_latent_image_ids(rows, tall // 2, wide // 2, device, dtype)
        fixed["txt_ids"] = torch.zeros(fixed["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype)
        if network.config.guidance_embeds:
            fixed["guidance"] = torch.full((rows,), embedded_guidance, device=device, dtype=torch.float32)
        return (tall * wide // 4, network.config.in_channels), fixed
    if network_name == "transformer":
        fixed["pooled_projections"] = both(negative_pooled, pooled)
    elif pooled is not None:
        width = pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(size, (0, 0), size, dtype, text_encoder_projection_dim=width)
        added = {"text_embeds": both(negative_pooled, pooled), "time_ids": ids.to(device).repeat(rows, 1)}
        fixed["added_cond_kwargs"] = added
    return (network.config.in_channels, size[0] // scale, size[1] // scale), fixed
