"""A diffusers pipeline with a LoRA adapter as what the trainers tune (``sdeblend.finetune.model.Tunable``).

The tuned network is the pipeline's own with the adapter active, the base the same network with it off: no copy. Both
are guided alike,

    out = out(negative) + g (out(prompt) - out(negative)),        g = 1: out(prompt),

so that with KL weight alpha the trainers' optimum is p_base exp(r / alpha) / Z for the *guided* base at this g, and
a blend of members keeps its meaning at this g. That holds for trainers of the chain itself. The regression trainer
noises samples again, so it needs a base that predicts the score of its own samples, and takes g = 1 only.

What is kept for a gradient decides the memory. By count, for Stable Diffusion 1.5 at 512 x 512 pixels in float32 with
its attention tuned, that is 1.5 GB a row of the denoiser (0.3 with ``checkpointing``) and 5.4 GB an image of the
decoder, beside 4 GB of weights: 10 GB with the numbers below, and 15 where the reward is differentiated.

Only the adapter's factors get gradients, and they are float32 whatever the network's precision.

Source: Hu et al. 2106.09685 (LoRA); Ho and Salimans 2207.12598 (guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdeblend.finetune.model import Condition
from stablediffusion.adapters.files import ABOUT, read_lora
from stablediffusion.adapters.loading import save_lora
from stablediffusion.adapters.switch import AdapterSwitch, activity_of, check_unfused
from stablediffusion.pipelines.components import denoiser_of, lora_components
from stablediffusion.pipelines.families import text_to_image
from stablediffusion.pipelines.identity import base_identity, same_base
from stablediffusion.pipelines.inputs import (
    denoiser_arguments,
    guidance_weight,
    guided,
    image_size,
    images_of,
    network_time,
)  # fmt: skip
from stablediffusion.pipelines.loading import no_false_alarms
from stablediffusion.pipelines.prompts import Draw, Encoder, PromptCondition, prompt_source
from stablediffusion.pipelines.schedulers import schedule_of

Layers = Literal["attention", "feed-forward", "convolutions"]
_TARGETS: dict[str, tuple[str, ...]] = {
    # FLUX.2's single blocks have attention and feed-forward layer in one
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    "feed-forward": (
        "ff.net.0.proj", "ff.net.2", "ff.linear_in", "ff.linear_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ),
    "convolutions": ("conv1", "conv2", "conv_shortcut"),
}  # fmt: skip
ADAPTER = "tuned"
# Of the rows that fit without a gradient, one in this many with what is kept for it.
_GRADED = 4


class PipelineTunable:
    """Base and LoRA of a text-to-image pipeline, of a family with a row in ``stablediffusion.pipelines.families``.

    The pipeline's networks are frozen, and it draws as before: the adapter is active in ``tuned`` only.

    Args:
        pipe: the pipeline; other adapters that are active on it belong to the base.
        prompts: to tune on, see ``prompt_source``.
        rank: of the factors.
        alpha: the change of a weight is ``alpha / rank`` B A; the rank by default.
        layers: which get an adapter.
        guidance: scale of classifier-free guidance, as the pipeline counts it; None is none (1, Z-Image: 0), at half
            the cost.
        negative: negative prompt for guidance; empty for what the pipeline has in its place.
        embedded_guidance: what a guidance-distilled network takes as input, as Flux; by default the pipeline's own.
        height, width: of the images in pixels; the model's own by default.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        batch: rows through the denoiser at once where no gradient is wanted.
        graded_batch: the same where one is, for trainers, which cut batches themselves; by default a quarter of
            ``batch``, or all of it with ``checkpointing``, and half of that with guidance.
        decode_batch: images decoded at once; where a gradient is wanted a quarter of it, computed again in the backward
            pass if these are not all.
        save_dtype: of the saved file's tensors.
        seed: of the adapter's first values.

    Attributes:
        schedule, prediction, event, device, guidance, graded_batch: see ``Tunable``.

    Raises:
        ValueError: another pipeline, layers that it lacks, values out of range, or an adapter of this name.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str] | str | Path | Draw,
        *,
        rank: int = 4,
        alpha: float | None = None,
        layers: Sequence[Layers] = ("attention",),
        guidance: float | None = None,
        negative: str = "",
        embedded_guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        checkpointing: bool = False,
        batch: int = 16,
        graded_batch: int | None = None,
        decode_batch: int = 8,
        save_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self._family = text_to_image(pipe, "tuning")
        self.guidance = guidance_weight(pipe, self._family.unguided if guidance is None else guidance)
        branches = 1 if self.guidance == 1 else 2
        if graded_batch is None:
            graded_batch = max(1, batch // (branches * (1 if checkpointing else _GRADED)))
        sizes = {"rank": rank, "batch": batch, "graded_batch": graded_batch, "decode_batch": decode_batch}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_unfused(pipe, lora_components(pipe).values())
        self.pipe, self.network = pipe, denoiser_of(pipe)[1]
        self.schedule, self.prediction = schedule_of(pipe)
        self.device, self.dtype = torch.device(pipe._execution_device), self.network.dtype
        self.branches, self.embedded_guidance, self.size = branches, embedded_guidance, image_size(pipe, height, width)
        self.checkpointing, self.save_dtype = checkpointing, save_dtype
        self.batch, self.decode_batch = batch, decode_batch
        self.graded_batch: int | None = graded_batch
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            pipe.vae.to(torch.float32)  # overflows in float16, says its configuration
        self._draw, self._encode = prompt_source(prompts), Encoder(pipe, negative or None, self.branches == 2)
        self._parameters = _add_adapter(self.network, rank, rank if alpha is None else alpha, layers, seed)
        self._switch = AdapterSwitch([self.network], [ADAPTER])
        self._active: tuple[str, ...] = ()
        if checkpointing:
            self.network.enable_gradient_checkpointing(self._checkpointed)
        self.event = self._family.event(pipe, self.size)

    def tuned(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        """Return the guided prediction with the adapter, (B, *event), at x (B, *event) and times t (B,) float64."""
        return self._predict(x, t, condition, (ADAPTER,))

    def base(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        """Return the guided prediction without it; differentiable in x."""
        return self._predict(x, t, condition, ())

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return the adapter's factors by name, float32."""
        return self._parameters

    def conditions(self, groups: int, size: int, generator: torch.Generator, /) -> PromptCondition:
        """Draw ``groups`` prompts, each repeated ``size`` times in a row.

        Raises:
            ValueError: if the source of prompts gave another number.
        """
        drawn = list(self._draw(groups, generator))
        if len(drawn) != groups:
            raise ValueError(f"the source of prompts must give {groups} prompts when asked, got {len(drawn)}; mend it")
        return self.condition([prompt for prompt in drawn for _ in range(size)])

    def condition(self, prompts: Sequence[str]) -> PromptCondition:
        """Return the condition of these prompts, one a row."""
        return self._encode(prompts)

    def decode(self, x: Tensor, /) -> Tensor:
        """Return the images of latents x (B, *event), (B, 3, H, W) in [0, 1]; differentiable."""

        def some(part: Tensor) -> Tensor:
            return images_of(self.pipe, part, self.size)

        graded = torch.is_grad_enabled() and x.requires_grad
        parts = x.split(max(1, self.decode_batch // _GRADED) if graded else self.decode_batch)
        if graded and (self.checkpointing or len(parts) > 1):
            return torch.cat([checkpoint(some, part, use_reentrant=False) for part in parts]).to(x.dtype)
        return torch.cat([some(part) for part in parts]).to(x.dtype)

    def save(self, path: Path, metadata: Mapping[str, str], /) -> Path:
        """Write the adapter as ``load_members`` reads it, with string metadata named ``sdeblend.*``."""
        about = {key.removeprefix(ABOUT): value for key, value in metadata.items()}
        about["guidance"] = repr(self.guidance - 1 + self._family.unguided)  # as the pipeline counts it
        return save_lora(self.pipe, path, ADAPTER, about=about, dtype=self.save_dtype)

    def load(self, path: str | Path) -> None:
        """Set the adapter to that of a saved member of the same rank, alpha and layers, to measure it or to go on.

        Raises:
            ValueError: for a file of another adapter, or one that names another base; nothing is changed then.
        """
        component = denoiser_of(self.pipe)[0]
        file = read_lora(path).qualified(component)
        given = {key.removeprefix(f"{component}.").removesuffix(".weight"): t for key, t in file.tensors.items()}
        metadata, config = file.metadata or {}, self.network.peft_config[ADAPTER]
        scale = metadata.get(f"{component}.lora_alpha", config.lora_alpha), metadata.get(f"{component}.r", config.r)
        own = {name: factor.shape for name, factor in self._parameters.items()}
        if own != {name: t.shape for name, t in given.items()} or scale != (config.lora_alpha, config.r):
            raise ValueError(
                f"a member to load must have rank {config.r}, alpha {config.lora_alpha:g} and {len(own)} factors, got "
                f"rank {scale[1]}, alpha {scale[0]:g} and {len(given)} factors in {path}; build the "
                "model with the settings it was tuned with"
            )
        base = file.about.get("base")
        if base is not None and not same_base(base, self.identity()):
            raise ValueError(
                f"a member to load needs the base it was tuned on, {base}, got {self.identity()} for {path}; load the "
                "pipeline it was made for"
            )
        with torch.no_grad():
            for name, factor in self._parameters.items():
                factor.copy_(given[name])

    def identity(self) -> str:
        """Return a text that tells the denoiser's own weights from any others."""
        return base_identity(self.network)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition | None, adapters: tuple[str, ...]) -> Tensor:
        if not isinstance(condition, PromptCondition) or len(condition) != len(x):
            given = len(condition) if isinstance(condition, PromptCondition) else type(condition).__name__
            raise ValueError(f"a prediction needs one prompt a row, got {given} for {len(x)} rows; draw conditions")
        if len(x) > self.batch and not torch.is_grad_enabled():
            parts = torch.arange(len(x)).split(self.batch)
            return torch.cat([self._predict(x[i], t[i], condition.rows(i), adapters) for i in parts])
        family = self._family
        arguments = denoiser_arguments(self.pipe, *condition.of_rows(), self.size, self.embedded_guidance)
        times = network_time(self.pipe, self.schedule, t).to(self.device, torch.float32).repeat(self.branches)
        state = family.given(x.to(self.dtype))
        rows: Any = state.repeat(self.branches, *[1] * (state.ndim - 1))
        rows = list(rows) if family.listed else rows
        arguments |= {family.time_name: times, "return_dict": False}
        with self._using(adapters):
            out = self.network(rows, **arguments)[0]
        out = family.predicted(torch.stack(out) if family.listed else out).to(x.dtype)
        return guided(out.unflatten(0, (self.branches, -1)), self.guidance, 0)

    @contextmanager
    def _using(self, adapters: tuple[str, ...]) -> Iterator[None]:
        before, self._active = self._active, adapters
        try:
            with self._switch.borrowed() as switch:
                switch.use(*adapters)
                yield
        finally:
            self._active = before

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Compute again, in the backward pass, with the adapters of the forward pass."""
        adapters = self._active

        def run(*inputs: Any) -> Any:
            with self._using(adapters):
                return function(*inputs)

        return checkpoint(run, *args, use_reentrant=False)


def _add_adapter(network: Any, rank: int, alpha: float, layers: Sequence[str], seed: int) -> dict[str, nn.Parameter]:
    """Put a LoRA that changes nothing yet on a network and return its factors by name."""
    unknown = [name for name in layers if name not in get_args(Layers)]
    if unknown or not layers:
        raise ValueError(f"layers must be some of {', '.join(get_args(Layers))}, got {', '.join(unknown) or 'none'}")
    if ADAPTER in getattr(network, "peft_config", {}):
        raise ValueError(f"tuning needs a pipeline without an adapter {ADAPTER!r}, got one; remove or rename it")
    names = [name for name, _ in network.named_modules()]
    for kind in layers:
        if not any(name.endswith(f".{target}") for name in names for target in _TARGETS[kind]):
            raise ValueError(f"layers name what the network has, got {kind!r}, which {type(network).__name__} lacks")
    targets = [target for kind in layers for target in _TARGETS[kind]]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    restore = activity_of([network])
    with torch.random.fork_rng(devices=[]), no_false_alarms():
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=ADAPTER)
    restore()  # outside ``tuned`` the pipeline is to run as it did
    found: dict[str, nn.Parameter] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            for factor, holder in (("A", layer.lora_A), ("B", layer.lora_B)):
                found[f"{name}.lora_{factor}"] = holder[ADAPTER].float().weight.requires_grad_(True)
    return found
