"""Diffusers pipelines as a backend of ``sdeblend evaluate``: members are LoRA files, rewards look at images.

    [backend]
    kind = "pipeline"
    path = "folder or hub id"        # left out: the bundled model
    prompts = "prompts.txt"          # one a line, or a list; the bundled model's own captions if left out
    captions = 16                    # of those, how many
    candidates = 512                 # drawings a caption, to measure against the exact target; 0 for none
    guidances = [1.0, 7.5]           # a variant each
    steps = 50                       # of the pipeline's own scheduler grid, DDIM's with this eta; the last ends at 0
    eta = 1.0
    report = ["align"]               # rewards to be reported besides the members'
    batch = 64                       # rows through a network at once, guidance branches counted
    [backend.members]                # reward -> LoRA file, folder, hub id, or a member of the bundled model
    compress = "compress"
    vivid = "vivid"
    [[backend.tuned]]                # members tuned for a preference itself (MORL)
    weights = [0.75, 0.25]
    member = "morl-25"
    [backend.pairs]                  # members tuned for (r_a + r_b) / 2, for the second order in the weights
    "compress+vivid" = "morl-50"
    [backend.half]                   # members tuned at twice the KL weight, for the quadratic strength
    compress = "compress-half"
    [backend.scales]                 # what a reward is divided by; as its member's file says, else 1
    [backend.gradients]              # reward -> a reward that is differentiable, for guidance in its place
    compress = "compress-smooth"
    [backend.rewards]                # where learned rewards have their weights, see ``stablediffusion.rewards.scoring``
    [[backend.sets]]                 # other members for the same rewards, a variant each, in place of all the above
    name = "alpha 0.25"              # tables of members, tuned, pairs, half
    [backend.sets.members]

All rewards are reported and weighed in units of their scale, so that with the scales of the members' files
the KL weight is theirs. For captions of the bundled model the exact target can be sampled, without guidance: drawings
tilted by exp(lambda r(w) / alpha). ``W1 of r(w)`` is the Wasserstein distance between the law of r(w) of the images and
of these, caption by caption, beside what exact samples have. Measured besides, within a prompt: ``diversity``, the
mean distance between two images, and ``moved``, that between an image and the base's on the same start and step noise
(``sdeblend.evaluate.backend.moved``); root mean square over the pixels.

Source: Diffusion Blend 2505.18547, section 6 (50 DDIM steps with eta 1, guidance 7.5).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler

from sdeblend.config import REQUIRED, Spec, check_keys
from sdeblend.evaluate.backend import Variant
from sdeblend.methods.interpolation import PAIR
from stablediffusion.adapters.files import find_lora, read_lora
from stablediffusion.adapters.members import Members, load_members
from stablediffusion.evaluate.case import PipelineCase
from stablediffusion.pipelines.identity import base_identity
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.pipelines.prompts import prompt_lines
from stablediffusion.rewards import ImageReward
from stablediffusion.rewards.scoring import image_rewards
from stablediffusion.scenes.captions import different_captions
from stablediffusion.scenes.scorer import WEIGHTS as SCORER
from stablediffusion.small import load_small
from stablediffusion.small.files import GUIDANCE, bundled_member, bundled_names

# Rewards that read the bundled scorer's file when they are asked.
_BY_SCORER = frozenset({"align", "correct"})
_PRECISIONS: Any = Literal["float32", "bfloat16", "float16"]
_SET: Spec = {
    "members": (dict, {}),
    "tuned": (list[dict], []),
    "pairs": (dict, {}),
    "half": (dict, {}),
}
_TUNED: Spec = {"weights": (list[float], REQUIRED), "member": (str, REQUIRED)}
_TABLE: Spec = {
    "path": (str, ""),
    "prompts": (str | list[str], []),
    "captions": (int, 16),
    "candidates": (int, 512),
    "guidances": (list[float], []),
    "negative": (str, ""),
    "steps": (int, 50),
    "eta": (float, 1.0),
    "height": (int, None),
    "width": (int, None),
    "dtype": (_PRECISIONS, "float32"),
    "batch": (int, 64),
    "report": (list[str], []),
    "scales": (dict, {}),
    "gradients": (dict, {}),
    "rewards": (dict, {}),
    "sets": (list[dict], []),
    **_SET,
}


class PipelineBackend:
    """A pipeline with its sets of members.

    Args:
        settings: the checked ``[backend]`` table.
        sets: name -> members, tuned, pairs and half; the first has the name "".
        prompts: to draw for.
        file: the settings file, for messages.
        device: where to compute.

    Raises:
        ValueError: a pipeline, member or reward that cannot be loaded.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        sets: Mapping[str, Mapping[str, Any]],
        prompts: Sequence[str],
        *,
        file: str,
        device: torch.device,
    ) -> None:
        self.settings, self.sets, self.prompts, self.file, self.device = settings, sets, list(prompts), file, device
        # Files, not yet the model: what cannot be found is told before anything is loaded.
        self.files = {
            (name, role): _file(source, file) for name, one in sets.items() for role, source in _sources(one)
        }
        names = tuple(next(iter(sets.values()))["members"])
        about = {key: read_lora(path).about for key, path in self.files.items()}
        self.variants = []
        for name in sets:
            alphas = {about[name, f"member:{reward}"].get("kl_weight") for reward in names}
            known = alphas.pop() if len(alphas) == 1 else None
            for guidance in settings["guidances"]:
                parts = [name] if len(sets) > 1 else []
                parts += [f"guidance {guidance:g}"] if len(settings["guidances"]) > 1 or not parts else []
                values = {"guidance": guidance, **({} if known is None else {"kl_weight": float(known)})}
                self.variants.append(Variant(", ".join(parts), names, values))
        self._at = dict(zip([v.name for v in self.variants],
                            [(n, g) for n in sets for g in settings["guidances"]], strict=True))  # fmt: skip

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, loaded when first asked for."""
        path, dtype = self.settings["path"], getattr(torch, self.settings["dtype"])
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
    def scales(self) -> list[dict[str, Any]]:
        """What each reward is divided by, on which variants; see ``sdeblend.evaluate.run.Scaled``."""
        found: dict[tuple[str, float], list[str]] = {}
        for variant in self.variants:
            case = self.case(variant.name, self.prompts[0])
            for name in (*variant.rewards, *self.settings["report"]):
                found.setdefault((name, case._scale(name)), []).append(variant.name)
        return [
            {"name": name, "scale": scale, "unit": self.rewards[name].unit, "variants": variants}
            for (name, scale), variants in found.items()
        ]

    @cached_property
    def _members(self) -> Members:
        """Every member of every set, by names that a network may have."""
        self.adapters = {key: f"m{place}" for place, key in enumerate(self.files)}
        return load_members(self.pipe, {self.adapters[key]: path for key, path in self.files.items()})

    @cached_property
    def rewards(self) -> dict[str, ImageReward]:
        """Every reward that is weighed, reported or differentiated."""
        settings = self.settings
        names = dict.fromkeys((*self.variants[0].rewards, *settings["report"], *settings["gradients"].values()))
        return image_rewards(
            list(names), settings["rewards"], file=self.file, section="[backend.rewards]", device=self.device
        )

    def case(self, variant: str, prompt: str) -> PipelineCase:
        """Return one variant and prompt."""
        name, guidance = self._at[variant]
        members = self._members
        roles = {role: self.adapters[name, role] for key, role in self.files if key == name}
        return PipelineCase(self, members, roles, self.sets[name], prompt, guidance)


def _networks(reward: ImageReward) -> dict[str, torch.nn.Module]:
    """Return the networks of a reward that holds any, by place."""
    function = reward.function
    if isinstance(function, torch.nn.Module):
        return {"": function}
    held = getattr(function, "__dict__", {})
    return {place: part for place, part in held.items() if isinstance(part, torch.nn.Module)}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _sources(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (role, source) of every member of a set."""
    out = [(f"member:{name}", source) for name, source in one["members"].items()]
    out += [(f"tuned:{place}", entry["member"]) for place, entry in enumerate(one["tuned"])]
    out += [(f"pair:{name}", source) for name, source in one["pairs"].items()]
    return out + [(f"half:{name}", source) for name, source in one["half"].items()]


def _file(source: str, file: str) -> Path:
    if source in bundled_names():
        return bundled_member(source)
    try:
        return find_lora(source)
    except ValueError as error:
        raise ValueError(f"{file}: [backend.members] {error}") from error


def build(table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> PipelineBackend:
    """Build the backend from its table; see the module's docstring and ``sdeblend.evaluate.backend.Builder``."""
    settings = check_keys(table, _TABLE, file=file, section="[backend]")
    for key, low in (("steps", 2), ("captions", 1), ("batch", 2), ("candidates", 0)):
        if settings[key] < low:
            raise ValueError(f"{file}: [backend] {key} must be at least {low}, got {settings[key]}")
    if not 0 <= settings["eta"] <= 1:
        raise ValueError(f"{file}: [backend] eta must lie within 0 and 1, got {settings['eta']:g}")
    settings["guidances"] = settings["guidances"] or [GUIDANCE if not settings["path"] else 7.5]
    sets = {"": {key: settings[key] for key in _SET}} if not settings["sets"] else {}
    for place, entry in enumerate(settings["sets"], start=1):
        head = f"[[backend.sets]] {place}"
        one = check_keys(entry, {"name": (str, REQUIRED), **_SET}, file=file, section=head)
        if one["name"] in sets:
            raise ValueError(f"{file}: {head} needs a name of its own, got {one['name']!r} again")
        sets[one.pop("name")] = one
    _check_sets(sets, file)
    _check_rewards(settings, tuple(next(iter(sets.values()))["members"]), file)
    return PipelineBackend(settings, sets, _prompts(settings, file, seed), file=file, device=device)


def _check_sets(sets: Mapping[str, dict[str, Any]], file: str) -> None:
    names = tuple(next(iter(sets.values()))["members"])
    for name, one in sets.items():
        head = f"set {name!r}" if name else "[backend]"
        if not names or tuple(one["members"]) != names:
            wanted, given = (", ".join(some) or "none" for some in (names, one["members"]))
            raise ValueError(f"{file}: {head} needs a member for each reward ({wanted}), got {given}; name them")
        for key in ("members", "pairs", "half"):
            wrong = [k for k, v in one[key].items() if not isinstance(v, str)]
            if wrong:
                raise ValueError(f"{file}: {head} {key} {wrong[0]} must be a file, folder, hub id or bundled member")
        pairs = [a + PAIR + b for a, b in combinations(names, 2)]
        for key, known in (("half", names), ("pairs", pairs)):
            _check_names(one[key], known, f"{file}: {head} {key}")
        one["tuned"] = [check_keys(t, _TUNED, file=file, section=f"{head} tuned") for t in one["tuned"]]
        if any(len(t["weights"]) != len(names) for t in one["tuned"]):
            raise ValueError(f"{file}: {head} tuned needs a weight for each of {', '.join(names)}; make them fit")


def _check_rewards(settings: Mapping[str, Any], names: Sequence[str], file: str) -> None:
    _check_names(settings["scales"], (*names, *settings["report"]), f"{file}: [backend.scales]")
    _check_names(settings["gradients"], names, f"{file}: [backend.gradients]")
    for name, scale in settings["scales"].items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"{file}: [backend.scales] {name} must be a finite number above 0, got {scale!r}")
    for name, stand_in in settings["gradients"].items():
        if not isinstance(stand_in, str):
            raise ValueError(f"{file}: [backend.gradients] {name} must be the name of a reward, got {stand_in!r}")


def _check_names(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    wrong = [name for name in table if name not in known]
    if wrong:
        raise ValueError(f"{where} must be of {', '.join(known) or 'none'}, got {wrong[0]!r}; correct it")


def _prompts(settings: Mapping[str, Any], file: str, seed: int) -> list[str]:
    given = settings["prompts"]
    if given:
        try:
            found = prompt_lines(given)
        except ValueError as error:
            raise ValueError(f"{file}: [backend] {error}") from error
    elif settings["path"]:
        raise ValueError(f"{file}: [backend] prompts is missing; give a file with one a line, or a list")
    else:
        found = different_captions(settings["captions"], torch.Generator().manual_seed(1000 + seed))
    if len(set(found)) < len(found):
        raise ValueError(f"{file}: [backend] prompts must differ, got {len(found) - len(set(found))} twice")
    return found
