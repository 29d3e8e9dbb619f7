"""A pipeline's base and members as a ``ScoreStack`` on latents: the core's solver samples Stable Diffusion.

    stack = pipeline_score(pipe, "a red circle", guidance_scale=7.5, members=members)
    sde = BackwardSDE(stack.schedule, Blend(stack, preference))
    solution = solve(sde, stack.prior(generator), time_grid(stack.schedule, 50), noise=generator, correct="certify")
    images = stack.decode(solution.samples)

Each member is guided by itself, S = S_neg + g (S_pos - S_neg), and converted from what the network predicts to a
score; with coefficients that sum to one the order does not matter. For flow models the score comes from the velocity:
the same marginals, sampled by an SDE where the pipeline itself follows the ODE. The state is float32 or float64
whatever the network's dtype.

What a pipeline does to a guided prediction besides is no part of its score: Qwen-Image brings it to the norm of the
positive prompt's prediction, token by token, which is no blend of its branches, and its pipeline's images differ by
that.

Source: Ho and Salimans 2207.12598 (guidance); Diffusion Blend 2505.18547, Algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdeblend import Preference
from sdeblend.parametrisation import conversion
from sdeblend.score import Bound, ScoreStack
from stablediffusion.adapters.members import Members
from stablediffusion.adapters.soups import SOUPS
from stablediffusion.blending.denoiser import Denoiser
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.families import Text, text_to_image
from stablediffusion.pipelines.inputs import (
    denoiser_arguments,
    encode_negatives,
    encode_prompts,
    guidance_weight,
    guided,
    image_size,
    images_of,
    network_time,
)  # fmt: skip
from stablediffusion.pipelines.schedulers import schedule_of


class PipelineScore(ScoreStack):
    """A text-to-image pipeline's base (member 0) and members as guided scores on latents.

    Args:
        pipe: text to image, of a family with a row in ``stablediffusion.pipelines.families``.
        prompt: one, or several.
        members: what ``load_members`` returned; None for the base alone.
        guidance_scale: of classifier-free guidance, as the pipeline counts it; no guidance (1, Z-Image: 0) is half the
            cost. By default the pipeline's own.
        negative_prompt: one, or one a prompt; by default what the pipeline has in its place, as zeros in SDXL.
        images: per prompt; the batch is prompts times images.
        embedded_guidance: what a guidance-distilled network takes as input, as Flux; by default the pipeline's own.
        height, width: of the images in pixels; the model's own by default.
        batched: adapters side by side in one pass; by default on a CUDA device only.

    Attributes:
        schedule: the forward process the network was trained on.
        prediction: what the network predicts: "eps", "v", "x0" or "flow".
        names: the members' names, the order of the stack after the base; a ``Preference`` weighs it by them.
        shape: of the state, (B, *event); Flux, FLUX.2 and Qwen-Image pack their latents into (B, tokens, channels).

    Raises:
        ValueError: another task or family, prompts and negative prompts that do not match, a size that the network has
            no tokens for, guidance of a model that takes none, or members that cannot run.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str | Sequence[str],
        *,
        members: Members | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        images: int = 1,
        embedded_guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batched: bool | None = None,
    ) -> None:
        self._family = text_to_image(pipe, "a score on latents")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if not prompts or (negatives is not None and len(negatives) != len(prompts)):
            given = 0 if negatives is None else len(negatives)
            raise ValueError(f"{len(prompts)} prompts need one negative prompt or as many, got {given}")
        if images < 1:
            raise ValueError(f"a prompt needs at least one image, got {images}")
        network = denoiser_of(pipe)[1]
        chosen = (members or Members(pipe, {})).on(pipe)
        if batched is None:
            batched = len(chosen) > 0 and next(network.parameters()).is_cuda and chosen.adapters_only
        self.pipe, self.size = pipe, image_size(pipe, height, width)
        self._g = guidance_weight(pipe, guidance_scale)
        self.guidance_scale = self._g - 1 + self._family.unguided
        self.schedule, self.prediction = schedule_of(pipe)
        self._take(chosen, bool(batched))
        self.dtype, self.device = network.dtype, pipe._execution_device
        self.branches = 1 if self._g == 1 else 2
        self._index: Tensor | None = None

        def encoded() -> tuple[list[Text], list[Text]]:
            positive = encode_prompts(pipe, prompts)
            negative = encode_negatives(pipe, negatives, positive) if self.branches == 2 else []
            rows = [[text for text in texts for _ in range(images)] for texts in (positive, negative)]
            return rows[0], rows[1]

        with torch.no_grad(), chosen.text_switch.borrowed() as switch:
            base = encoded()
            for member in chosen.text_members:
                switch.use(str(member.adapter))
                self._denoiser.embeddings.record(member.name, _tensors(*base), _tensors(*encoded()))
        self._fixed = denoiser_arguments(pipe, *base, self.size, embedded_guidance)
        self.shape = (len(prompts) * images, *self._family.event(pipe, self.size))

    def _take(self, members: Members, side_by_side: bool) -> None:
        network = denoiser_of(self.pipe)[1]
        self.members, self.names = members, members.names
        self._denoiser = Denoiser(network.forward, network, members, side_by_side=side_by_side)

    def __len__(self) -> int:
        return 1 + len(self.members)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None, /) -> Tensor:
        """Return the guided scores (K, B, *event) of base and members, or of those in ``active``.

        Args:
            x: latents (B, *event).
            t: time, 0-dim float64, t > 0.
            active: positions in the stack.
        """
        family, rows = self._family, self.branches * self.shape[0]
        value = network_time(self.pipe, self.schedule, t)
        # float32 but for a network of float64
        times = value.to(x.device, torch.promote_types(self.dtype, torch.float32)).expand(rows)
        state = family.given(x.to(self.dtype))
        # only the shape counts: the rows themselves come with the state below
        placeholder: Any = state[:1].new_zeros(1).expand(rows, *state.shape[1:])
        placeholder = list(placeholder) if family.listed else placeholder
        arguments = {family.time_name: times, "return_dict": False}
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad), self.members.switch.borrowed():
            stack = self._denoiser.bind((placeholder,), self._fixed | arguments, self.shape[0])
            stack = stack if self._index is None else stack.rows(self._index)
            branched = state.unsqueeze(1).expand(-1, self.branches, *state.shape[1:])
            out = guided(family.predicted(stack(branched, t, active)).to(x.dtype), self._g, 2)
        p, q = conversion(self.schedule, t, self.prediction, "score")
        return float(p) * x + float(q) * out

    def rows(self, index: Tensor) -> PipelineScore:
        """Return the stack for the images ``index``."""
        part = copy.copy(self)
        part._index = index if self._index is None else self._index[index]
        return part

    def alone(self) -> PipelineScore:
        """Return the base without the members; adapters that are active, theirs too, then belong to it."""
        base = copy.copy(self)
        base._take(self.members.chosen(()), False)
        return base

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
        with torch.no_grad(), _as_the_pipeline(self.pipe.vae, self._family.upcasts):
            images = images_of(self.pipe, latents, self.size)
        plain = [False] * len(images)
        return self.pipe.image_processor.postprocess(images, output_type=output_type, do_denormalize=plain)


def _tensors(*parts: Sequence[Text]) -> list[Tensor]:
    """Return each kind of embedding of each part, one a row."""
    return [torch.stack([text[name] for text in texts]) for texts in parts if texts for name in texts[0]]


@contextmanager
def _as_the_pipeline(vae: Any, upcasts: bool) -> Iterator[None]:
    """Decode in float32 where the pipeline does."""
    dtype = vae.dtype
    upcast = upcasts and dtype == torch.float16 and bool(vae.config.force_upcast)
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(dtype)


class SoupScore(Bound):
    """The score of one network whose adapters are averaged: the rewarded soup, on latents.

    Args:
        stack: of the pipeline; its own members do not count.
        members: LoRA members of the denoiser.
        preference: over the members.
        mode: "soup" for the exact average of the changes, "soup-factors" for that of the factors.

    Raises:
        ValueError: a preference an image, or one that names no member; a member that changes the text encoder, or is
            a whole network.
    """

    def __init__(
        self, stack: PipelineScore, members: Members, preference: Preference | Mapping[str, float], mode: str
    ) -> None:
        preference = preference if isinstance(preference, Preference) else Preference(preference)
        coefficients = preference.coefficients(members.names)
        if coefficients.ndim == 2:
            raise ValueError("a soup is one network and needs one preference, got one an image; use a Blend")
        named = dict(zip(members.names, coefficients[1:].tolist(), strict=True))
        self.coefficients = {name: c for name, c in named.items() if c or name in (preference.names or named)}
        for name in self.coefficients:
            if members[name].text_encoders or members[name].module is not None:
                raise ValueError(f"a soup of scores needs LoRA members of the denoiser alone, got {name!r}")
        self.base, self.members, self.mode = stack.alone(), members, mode

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided score (B, *event)."""
        # What is active and no member of ``base`` belongs to its network: here, the soup.
        with self.members.switch.borrowed() as switch, SOUPS[self.mode](switch, self.coefficients):
            return self.base(x, t, (0,))[0]

    def rows(self, index: Tensor) -> SoupScore:
        """Return the score of the images ``index``."""
        part = copy.copy(self)
        part.base = self.base.rows(index)
        return part


pipeline_score = PipelineScore
