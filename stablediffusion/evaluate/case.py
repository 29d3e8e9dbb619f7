"""One set of members, guidance and prompt of a pipeline, ready for the methods of ``sdeblend evaluate``.

The state is the latents; scores come from ``PipelineScore`` on the pipeline's own grid, whose last step goes to t = 0.
Rewards look at decoded images, in units of their scale; where one fails, methods and rows see NaN, and the image is
told and kept. Networks get at most ``batch`` rows at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from sdeblend.blend import Blend
from sdeblend.evaluate.backend import Distance, MeasuredCase, moved
from sdeblend.methods.case import Drawn, MoreMembers, OneModel, StateReward
from sdeblend.methods.draws import Draws
from sdeblend.methods.interpolation import PAIR
from sdeblend.preference import Preference
from sdeblend.score import Bound, ScoreFunction, ScoreStack, restrict_rows
from sdeblend.shell.files import write_atomically
from sdeblend.steps import Ancestral
from stablediffusion.adapters.members import Members
from stablediffusion.blending.latents import PipelineScore, SoupScore, pipeline_score
from stablediffusion.pipelines.inputs import images_of
from stablediffusion.pipelines.schedulers import scheduler_grid
from stablediffusion.rewards.scoring import Prompts, score_each
from stablediffusion.scenes.captions import parse
from stablediffusion.small.candidates import SCORED, draw_candidates

if TYPE_CHECKING:
    from stablediffusion.evaluate.backend import PipelineBackend

# Sets of exact samples, for what distances they have.
FLOORS: Final = 32
_SOUPS = {"soup-deltas": "soup", "soup-factors": "soup-factors"}


class PipelineCase(MeasuredCase):
    """One set of members, guidance and prompt.

    Args:
        backend: pipeline, rewards and settings.
        members: all that are loaded.
        roles: "member:name", "tuned:place", "pair:a+b", "half:name" -> name among the members.
        chosen: the set's table.
        prompt: what is drawn.
        guidance: g.
    """

    def __init__(
        self,
        backend: PipelineBackend,
        members: Members,
        roles: Mapping[str, str],
        chosen: Mapping[str, Any],
        prompt: str,
        guidance: float,
    ) -> None:
        self.backend, self.members, self.roles, self.chosen = backend, members, roles, chosen
        self.prompt, self.guidance = prompt, guidance
        settings = backend.settings
        self.names = tuple(chosen["members"])
        weights = {members[roles[f"member:{name}"]].kl_weight for name in self.names}
        self.kl_weight = weights.pop() if len(weights) == 1 else None
        base = self._stack(1, [])
        self.schedule, self.step = base.schedule, Ancestral(settings["eta"])
        self.grid = scheduler_grid(backend.pipe, settings["steps"])
        # DDIM leaves the noise of its first trained time in the sample; rewards and potentials are of clean ones.
        self.grid[-1] = 0.0
        self.like = torch.zeros(base.shape[1:], device=backend.device)
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
            return _Cut(soup, self.backend.settings["batch"] // self._branches, batch)
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
        values = self.scored((*self.names, *self.backend.settings["report"]), self._images(samples))
        return {name: value / self._scale(name) for name, value in values.items()}

    def scored(
        self, names: Sequence[str], images: Tensor, *, way: str = "", differentiate: bool = False
    ) -> dict[str, Tensor]:
        """Return rewards by name, (B,), NaN where one failed; what it failed on is told, and kept.

        Args:
            names: of rewards.
            images: (B, 3, H, W) in [0, 1].
            way: what a failure is told with, if a method asks, on its way to the samples.
            differentiate: whether gradients are to reach the images.
        """
        folder, stem = self.kept_at or (None, "")
        if way:
            self._asked += 1
            stem = f"{stem}-{self._asked}"
        values, failures = score_each(
            {name: self.backend.rewards[name] for name in names}, images, Prompts((self.prompt,) * len(images)),
            keep=None if folder is None else folder / "failed", stem=stem, differentiate=differentiate,
        )  # fmt: skip
        self.failures = [*self.failures, *(way + failure for failure in failures)]
        return values

    def reward(self, name: str) -> StateReward:
        return _ImageScore(self, name, self._scale(name))

    def differentiable(self, name: str) -> StateReward | None:
        stand_in = self.backend.settings["gradients"].get(name, name)
        found = self.backend.rewards[stand_in].differentiable
        return _ImageScore(self, stand_in, self._scale(name), differentiate=True) if found else None

    def measure(self, drawn: Drawn, preference: Preference) -> dict[str, Distance]:
        found_law = self._law(preference)
        if found_law is None:
            return {}
        exact, law = found_law
        shares = self.shares(preference)
        chosen = {name: self.backend.rewards[name] for name in self.names}
        values, _ = score_each(chosen, self._images(drawn.samples), Prompts((self.prompt,) * len(drawn.samples)))
        parts = [w / self._scale(name) * values[name].double() for name, w in shares.items()]
        found = torch.stack(parts).sum(0).cpu().numpy()
        if not np.isfinite(found).all():
            return {"W1 of r(w)": Distance(float("nan"))}
        weights = None if drawn.log_weights is None else drawn.log_weights.double().softmax(0).cpu().numpy()
        rng, count = np.random.default_rng(0), drawn.effective
        floors = [wasserstein_distance(rng.choice(exact, count, p=law), exact, None, law) for _ in range(FLOORS)]
        distance = wasserstein_distance(found, exact, weights, law)
        return {"W1 of r(w)": Distance(float(distance), float(np.mean(floors)), float(np.std(floors, ddof=1)))}

    def expected(self, preference: Preference) -> dict[str, float]:
        found = self._law(preference)
        if found is None or self._target is None:
            return {}
        return {name: float(found[1] @ r.numpy()) / self._scale(name) for name, r in self._target.items()}

    def _law(self, preference: Preference) -> tuple[np.ndarray, np.ndarray] | None:
        """Return lambda r(w) of drawings, (J,), and their probabilities under the exact target, if it is known."""
        if self._target is None or self.kl_weight is None:
            return None
        parts = [w / self._scale(name) * self._target[name] for name, w in self.shares(preference).items()]
        exact = torch.stack(parts).sum(0)
        return exact.numpy(), (exact / self.kl_weight).softmax(0).numpy()

    @cached_property
    def _target(self) -> dict[str, Tensor] | None:
        """The members' rewards of drawings of the caption, float64 (J,); None for what is no caption."""
        count = self.backend.settings["candidates"]
        if self.backend.settings["path"] or not count or not set(self.names) <= set(SCORED):
            return None
        try:
            parse(self.prompt)
        except ValueError:
            return None
        seed = int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        found = draw_candidates(self.backend.pipe, [self.prompt], count=count, generator=generator)
        return {name: found.rewards[name][0].double() for name in self.names}

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

    @property
    def _branches(self) -> int:
        return 1 if self.guidance == 1 else 2

    def _stack(self, batch: int, roles: Sequence[str]) -> PipelineScore:
        settings = self.backend.settings
        return pipeline_score(
            self.backend.pipe,
            self.prompt,
            members=self.members.chosen([self.roles[role] for role in roles]),
            guidance_scale=self.guidance,
            negative_prompt=settings["negative"],
            images=batch,
            height=settings["height"],
            width=settings["width"],
        )

    def _cut(self, stack: PipelineScore) -> ScoreStack:
        return _CutStack(stack, self.backend.settings["batch"] // self._branches, stack.shape[0])

    def _tuned(self, preference: Preference) -> str | None:
        """Return the role of the member that was tuned for these weights at this strength."""
        weights = torch.tensor(list(self.weights(preference).values())) * preference.strength
        for place, entry in enumerate(self.chosen["tuned"]):
            if bool((weights - torch.tensor(entry["weights"])).abs().max() < 1e-6):
                return f"tuned:{place}"
        alone = [name for name, w in zip(self.names, weights.tolist(), strict=True) if abs(w - 1) < 1e-6]
        return f"member:{alone[0]}" if len(alone) == 1 and abs(float(weights.abs().sum()) - 1) < 1e-6 else None

    def _scale(self, name: str) -> float:
        given = self.backend.settings["scales"].get(name)
        if given is not None:
            return float(given)
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
        parts = [images_of(self.backend.pipe, part, self.size) for part in x.split(self.backend.settings["batch"])]
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


class _Cut(Bound):
    """A score that is given at most ``most`` rows at once."""

    def __init__(self, score: Any, most: int, rows: int) -> None:
        self.score, self.parts = score, torch.arange(rows).split(max(1, most))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([restrict_rows(self.score, part)(x[part], t) for part in self.parts])

    def rows(self, index: Tensor) -> _Cut:
        return _Cut(restrict_rows(self.score, index), len(self.parts[0]), len(index))


class _ImageScore:
    """A reward of latents: decoded, scored, in units of its scale."""

    def __init__(self, case: PipelineCase, name: str, scale: float, *, differentiate: bool = False) -> None:
        self.case, self.name, self.scale, self.differentiate = case, name, scale, differentiate

    def __call__(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.differentiate):
            images = self.case.decode(x)
        found = self.case.scored([self.name], images, way="on the way, ", differentiate=self.differentiate)
        return found[self.name].to(x) / self.scale
