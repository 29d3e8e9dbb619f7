"""One set of members, guidance and prompt of a pipeline, ready for the methods of ``sdeblend evaluate``.

The state is the latents; scores come from ``PipelineScore`` on the pipeline's own grid, whose last step goes to t = 0.
Rewards look at decoded images, in units of their scale; where one fails, methods and rows see NaN, the failure is
reported, and the image kept. Networks get at most ``batch`` rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.blend import Blend
from sdeblend.evaluate.backend import MeasuredCase, moved
from sdeblend.evaluate.results import Distance
from sdeblend.methods.case import Drawn, MoreMembers, OneModel, StateReward
from sdeblend.methods.draws import Draws
from sdeblend.methods.interpolation import PAIR
from sdeblend.preference import Preference
from sdeblend.reward import Reward
from sdeblend.score import ScoreFunction, ScoreStack, Stack
from sdeblend.shell.files import write_atomically
from sdeblend.steps import Ancestral
from stablediffusion.adapters.members import Members
from stablediffusion.blending.latents import PipelineScore, SoupScore, pipeline_score
from stablediffusion.evaluate.settings import MemberSet, PipelineSettings
from stablediffusion.evaluate.target import Target, target_of
from stablediffusion.pipelines.grids import scheduler_grid
from stablediffusion.pipelines.inputs import images_of
from stablediffusion.rewards.scoring import Prompts, score_each

_SOUPS = {"soup-deltas": "soup", "soup-factors": "soup-factors"}


@dataclass(frozen=True)
class Loaded:
    """What the cases of a backend share.

    Attributes:
        pipe: the pipeline.
        members: of every set.
        rewards: every reward that is weighed, reported or differentiated, by name.
        settings: of the backend.
        device: where to compute.
    """

    pipe: Any
    members: Members
    rewards: Mapping[str, Reward]
    settings: PipelineSettings
    device: torch.device


class PipelineCase(MeasuredCase):
    """One set of members, guidance and prompt.

    Args:
        loaded: pipeline, members, rewards and settings.
        roles: "member:name", "tuned:place", "pair:a+b", "half:name" -> name among the members.
        chosen: the set of members.
        prompt: what is drawn.
        guidance: g.
    """

    def __init__(
        self, loaded: Loaded, roles: Mapping[str, str], chosen: MemberSet, prompt: str, guidance: float
    ) -> None:
        self.loaded, self.roles, self.chosen = loaded, roles, chosen
        self.members, self.settings = loaded.members, loaded.settings
        self.prompt, self.guidance, self.names = prompt, guidance, chosen.names
        weights = {self.members[roles[f"member:{name}"]].kl_weight for name in self.names}
        self.kl_weight = weights.pop() if len(weights) == 1 else None
        # Rows of states that a network takes at once.
        self.most = self.settings.batch // (1 if guidance == 1 else 2)
        base = self._stack(1, [])
        self.schedule, self.step = base.schedule, Ancestral(self.settings.eta)
        self.grid = scheduler_grid(loaded.pipe, self.settings.steps, height=base.size[0], width=base.size[1])
        # DDIM leaves the noise of its first trained time in the sample; rewards and potentials are of clean ones.
        self.grid[-1] = 0.0
        self.like = torch.zeros(base.shape[1:], device=loaded.device)
        self.size = base.size
        self._asked = 0
        self._seen: tuple[Tensor, Tensor] | None = None
        self._based: tuple[Draws, Tensor] | None = None

    def begin(self, folder: Path, stem: str) -> None:
        super().begin(folder, stem)
        self._asked = 0

    def stack(self, batch: int) -> ScoreStack:
        return self._cut(self._stack(batch, [f"member:{name}" for name in self.names]))

    def differentiable_base(self, batch: int) -> ScoreFunction:
        return Blend(self._cut(self._stack(batch, [])), [1.0])

    def score(self, role: OneModel, preference: Preference, batch: int) -> ScoreFunction | None:
        if role in _SOUPS:
            named = {self.roles[f"member:{name}"]: w for name, w in self.weights(preference).items()}
            own = Preference(named, preference.strength)
            soup = SoupScore(self._stack(batch, []), self.members, own, _SOUPS[role])
            return Blend(_CutStack(Stack([soup]), self.most, batch), [1.0])
        tuned = self._tuned(preference)
        return None if tuned is None else Blend(self._cut(self._stack(batch, [tuned])), [0.0, 1.0])

    def higher_order(
        self, role: MoreMembers, preference: Preference, batch: int
    ) -> tuple[ScoreStack, tuple[str, ...]] | None:
        used = [name for name, weight in self.weights(preference).items() if weight]
        if role == "half":
            own = {f"{kind}:{name}": f"{where}:{name}" for name in used
                   for kind, where in (("half", "half"), ("full", "member"))}  # fmt: skip
        else:
            pairs = [a + PAIR + b for i, a in enumerate(self.names) for b in self.names[i + 1 :]]
            own = {name: f"member:{name}" for name in self.names} | {pair: f"pair:{pair}" for pair in pairs}
        if not set(own.values()) <= set(self.roles):
            return None
        return self._cut(self._stack(batch, list(own.values()))), ("base", *own)

    def rewards(self, samples: Tensor) -> dict[str, Tensor]:
        values = self.scored((*self.names, *self.settings.report), self._images(samples))
        return {name: value / self.scale(name) for name, value in values.items()}

    def scored(
        self, names: Sequence[str], images: Tensor, *, way: str = "", differentiate: bool = False
    ) -> dict[str, Tensor]:
        """Return rewards by name, (B,), NaN where one failed; the failure is reported, and the image kept.

        Args:
            names: of rewards.
            images: (B, 3, H, W) in [0, 1].
            way: what the report begins with, if a method asks, on its way to the samples.
            differentiate: whether gradients are to reach the images.
        """
        folder, stem = self.kept_at or (None, "")
        if way:
            self._asked += 1
            stem = f"{stem}-{self._asked}"
        values, failures = score_each(
            {name: self.loaded.rewards[name] for name in names}, images, Prompts((self.prompt,) * len(images)),
            keep=None if folder is None else folder / "failed", stem=stem, differentiate=differentiate,
        )  # fmt: skip
        self.failures = [*self.failures, *(way + failure for failure in failures)]
        return values

    def reward(self, name: str) -> StateReward:
        return _ImageScore(self, name, self.scale(name))

    def differentiable(self, name: str) -> StateReward | None:
        stand_in = self.settings.gradients.get(name, name)
        found = self.loaded.rewards[stand_in].differentiable
        return _ImageScore(self, stand_in, self.scale(name), differentiate=True) if found else None

    def measure(self, drawn: Drawn, preference: Preference) -> dict[str, Distance]:
        if self.target is None:
            return {}
        chosen = {name: self.loaded.rewards[name] for name in self.names}
        values, _ = score_each(chosen, self._images(drawn.samples), Prompts((self.prompt,) * len(drawn.samples)))
        shares = self.shares(preference)
        parts = [share / self.scale(name) * values[name].double() for name, share in shares.items()]
        found = torch.stack(parts).sum(0).cpu().numpy()
        return {"W1 of r(w)": self.target.distance(found, shares, drawn.log_weights, drawn.effective)}

    def expected(self, preference: Preference) -> dict[str, float]:
        return {} if self.target is None else self.target.means(self.shares(preference))

    @cached_property
    def target(self) -> Target | None:
        """The exact target, where it is known."""
        count = self.settings.candidates
        if self.settings.path or not count:
            return None
        return target_of(self.loaded.pipe, self.prompt, self.names, self.scale, self.kl_weight, count)

    def describe(self, drawn: Drawn, draws: Draws) -> dict[str, float]:
        images, base = self._images(drawn.samples), self._base_images(draws)
        flat = images.flatten(1)
        facts = moved(drawn, images, base)
        if len(flat) > 1:
            facts["diversity"] = float(torch.pdist(flat).mean()) / flat.shape[1] ** 0.5
        return facts

    def keep(self, samples: Tensor, folder: Path, stem: str) -> dict[str, list[Any]]:
        """Write one file, and return where each image is in it: its name, and left, upper, right, lower in pixels."""
        from sdeblend.shell.figures import encoded, montage

        images, name = self._images(samples), f"images/{stem}.png"
        columns, (height, width) = math.ceil(math.sqrt(len(images))), images.shape[-2:]
        write_atomically(folder / name, encoded(montage(images, columns)))
        places = [(i % columns * width, i // columns * height) for i in range(len(images))]
        return {"image": [{"file": name, "box": [x, y, x + width, y + height]} for x, y in places]}

    def _stack(self, batch: int, roles: Sequence[str]) -> PipelineScore:
        return pipeline_score(
            self.loaded.pipe,
            self.prompt,
            members=self.members.chosen([self.roles[role] for role in roles]),
            guidance_scale=self.guidance,
            negative_prompt=self.settings.negative or None,
            images=batch,
            height=self.settings.height,
            width=self.settings.width,
        )

    def _cut(self, stack: PipelineScore) -> ScoreStack:
        return _CutStack(stack, self.most, stack.shape[0])

    def _tuned(self, preference: Preference) -> str | None:
        """Return the role of the member that was tuned for these weights at this strength."""
        weights = torch.tensor(list(self.weights(preference).values())) * preference.strength
        for place, entry in enumerate(self.chosen.tuned):
            if bool((weights - torch.tensor(entry.weights)).abs().max() < 1e-6):
                return f"tuned:{place}"
        alone = [name for name, w in zip(self.names, weights.tolist(), strict=True) if abs(w - 1) < 1e-6]
        return f"member:{alone[0]}" if len(alone) == 1 and abs(float(weights.abs().sum()) - 1) < 1e-6 else None

    def scale(self, name: str) -> float:
        """Return what a reward is divided by."""
        if name in self.settings.scales:
            return self.settings.scales[name]
        role = f"member:{name}"
        return float(self.members[self.roles[role]].scales.get(name, 1.0)) if role in self.roles else 1.0

    def _images(self, samples: Tensor) -> Tensor:
        """Return the images of samples, (B, 3, H, W) in [0, 1]; the last ones are remembered."""
        if self._seen is None or self._seen[0] is not samples:
            with torch.no_grad():
                self._seen = samples, self.decode(samples)
        return self._seen[1]

    def _base_images(self, draws: Draws) -> Tensor:
        if self._based is None or self._based[0] is not draws:
            with torch.no_grad():
                self._based = draws, self.decode(self.base_samples(draws))
        return self._based[1]

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of clean latents (B, *event), (B, 3, H, W) in [0, 1], differentiable."""
        parts = [images_of(self.loaded.pipe, part, self.size) for part in x.split(self.settings.batch)]
        return torch.cat(parts).to(x.dtype)


class _CutStack(ScoreStack):
    """A stack that is given at most ``most`` rows at once."""

    def __init__(self, stack: ScoreStack, most: int, rows: int) -> None:
        self.stack, self.names, self.parts = stack, stack.names, torch.arange(rows).split(max(1, most))

    def __len__(self) -> int:
        return len(self.stack)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        if len(self.parts) == 1:
            return self.stack(x, t, active)
        return torch.cat([self.stack.rows(part)(x[part], t, active) for part in self.parts], 1)

    def rows(self, index: Tensor) -> _CutStack:
        return _CutStack(self.stack.rows(index), len(self.parts[0]), len(index))


class _ImageScore:
    """A reward of latents: decoded, scored, in units of its scale."""

    def __init__(self, case: PipelineCase, name: str, scale: float, *, differentiate: bool = False) -> None:
        self.case, self.name, self.scale, self.differentiate = case, name, scale, differentiate

    def __call__(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.differentiate):
            images = self.case.decode(x)
        found = self.case.scored([self.name], images, way="on the way, ", differentiate=self.differentiate)
        return found[self.name].to(x) / self.scale
