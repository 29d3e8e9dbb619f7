"""Diffusers pipelines as a backend of ``sdeblend evaluate``: members are LoRA files, rewards look at images.

``settings`` has the keys of its table. All rewards are reported and weighed in units of their scale, so that with the
scales of the members' files the KL weight is theirs. For captions of the bundled model the exact target can be
sampled, without guidance (``target``). Measured besides, within a prompt: ``diversity``, the mean distance between two
images, and ``moved``, that between an image and the base's on the same start and step noise
(``sdeblend.evaluate.backend.moved``); root mean square over the pixels.

Source: Diffusion Blend 2505.18547, section 6 (50 DDIM steps with eta 1, guidance 7.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from sdeblend.evaluate.backend import Backend
from sdeblend.evaluate.results import Scale, Variant
from sdeblend.reward import Reward
from sdeblend.shell.settings import parse
from stablediffusion.adapters.files import find_lora, read_lora
from stablediffusion.adapters.members import load_members
from stablediffusion.evaluate.case import Loaded, PipelineCase
from stablediffusion.evaluate.settings import PipelineSettings
from stablediffusion.pipelines.identity import base_identity
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.pipelines.prompts import prompt_lines
from stablediffusion.rewards.registry import image_rewards
from stablediffusion.scenes.captions import different_captions
from stablediffusion.scenes.scorer import WEIGHTS as SCORER
from stablediffusion.small import load_small
from stablediffusion.small.files import bundled_member, bundled_names

# Rewards that read the bundled scorer's file when they are asked.
_BY_SCORER = frozenset({"align", "correct"})


class PipelineBackend(Backend):
    """A pipeline with its sets of members.

    Args:
        settings: the ``[backend]`` table.
        prompts: to draw for.
        file: the settings file, for messages.
        device: where to compute.

    Raises:
        ValueError: a pipeline, member or reward that cannot be loaded.
    """

    def __init__(self, settings: PipelineSettings, prompts: Sequence[str], *, file: str, device: torch.device) -> None:
        self.settings, self.prompts, self.file, self.device = settings, list(prompts), file, device
        # Files, not yet the model: what cannot be found is reported before anything is loaded.
        self.files = {
            (name, role): _file(source, file)
            for name, one in settings.by_name.items()
            for role, source in one.sources()
        }
        about = {key: read_lora(path).about for key, path in self.files.items()}
        names, guidances = settings.first_names, settings.each_guidance
        self.variants: list[Variant] = []
        self._at: dict[str, tuple[str, float]] = {}
        for name in settings.by_name:
            alphas = {about[name, f"member:{reward}"].get("kl_weight") for reward in names}
            known = alphas.pop() if len(alphas) == 1 else None
            for guidance in guidances:
                parts = [name] if len(settings.by_name) > 1 else []
                parts += [f"guidance {guidance:g}"] if len(guidances) > 1 or not parts else []
                values = {"guidance": guidance, **({} if known is None else {"kl_weight": float(known)})}
                self.variants.append(Variant(", ".join(parts), names, values))
                self._at[self.variants[-1].name] = name, guidance

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, loaded when first asked for."""
        path, dtype = self.settings.path, getattr(torch, self.settings.dtype)
        pipe = load_pipeline(path, dtype, what=f"{self.file}: [backend] path") if path else load_small(dtype)
        if hasattr(pipe.scheduler, "alphas_cumprod"):
            # clipping is a default of this class and wrong on latents
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipe.to(self.device)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Hashes of every network that decides samples or rewards, adapters left out, and of every member's file."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        for name, reward in self.rewards.items():
            parts |= {f"{name} {place}".strip(): part for place, part in _networks(reward).items()}
        networks = {name: base_identity(part) for name, part in parts.items()}
        if not _BY_SCORER.isdisjoint(self.rewards):
            networks["scorer"] = _hash(SCORER)
        names = {key: f"{key[0]}/{key[1]}" if key[0] else key[1] for key in self.files}
        return {"networks": networks} | {names[key]: _hash(path) for key, path in self.files.items()}

    @cached_property
    def scales(self) -> list[Scale]:
        """What each reward is divided by, on which variants."""
        found: dict[tuple[str, float], list[str]] = {}
        for variant in self.variants:
            case = self.case(variant.name, self.prompts[0])
            for name in (*variant.rewards, *self.settings.report):
                found.setdefault((name, case.scale(name)), []).append(variant.name)
        return [
            Scale(name=name, scale=scale, unit=self.rewards[name].unit, variants=variants)
            for (name, scale), variants in found.items()
        ]

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        """Every reward that is weighed, reported or differentiated."""
        settings = self.settings
        names = dict.fromkeys((*settings.first_names, *settings.report, *settings.gradients.values()))
        return image_rewards(
            list(names), settings.rewards, file=self.file, section="[backend.rewards]", device=self.device
        )

    @cached_property
    def loaded(self) -> Loaded:
        """Pipeline and rewards with every member of every set, by names that a network may have."""
        # Rewards first, for they are what is wrong most often.
        rewards, self.adapters = self.rewards, {key: f"m{place}" for place, key in enumerate(self.files)}
        members = load_members(self.pipe, {self.adapters[key]: path for key, path in self.files.items()})
        return Loaded(self.pipe, members, rewards, self.settings, self.device)

    def case(self, variant: str, prompt: str) -> PipelineCase:
        """Return one variant and prompt."""
        name, guidance = self._at[variant]
        loaded = self.loaded
        roles = {role: self.adapters[name, role] for key, role in self.files if key == name}
        return PipelineCase(loaded, roles, self.settings.by_name[name], prompt, guidance)


def _networks(reward: Reward) -> dict[str, torch.nn.Module]:
    """Return the networks of a reward that holds any, by place."""
    function = reward.function
    if isinstance(function, torch.nn.Module):
        return {"": function}
    held = getattr(function, "__dict__", {})
    return {place: part for place, part in held.items() if isinstance(part, torch.nn.Module)}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _file(source: str, file: str) -> Path:
    if source in bundled_names():
        return bundled_member(source)
    try:
        return find_lora(source)
    except ValueError as error:
        raise ValueError(f"{file}: [backend.members] {error}") from error


def build(table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> PipelineBackend:
    """Build the backend from its table; see ``sdeblend.evaluate.backend.Builder``."""
    settings = parse(PipelineSettings, table, file=file, section="[backend]")
    try:
        prompts = prompt_lines(settings.prompts) if settings.prompts else None
    except ValueError as error:
        raise ValueError(f"{file}: [backend] {error}") from error
    prompts = prompts or different_captions(settings.captions, torch.Generator().manual_seed(1000 + seed))
    if len(set(prompts)) < len(prompts):
        raise ValueError(f"{file}: [backend] prompts must differ, got {len(prompts) - len(set(prompts))} twice")
    return PipelineBackend(settings, prompts, file=file, device=device)
