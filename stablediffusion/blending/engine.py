"""What runs in place of a pipeline's denoisers, scheduler step and prompt encoder while a blend is attached.

Each denoiser call is one evaluation of the core's ``Blend``, or of one member an image, over the call's ``Pass``; each
scheduler step adds the weights of the passes since the last one (``guidance``, ``particles``). What one run of the
pipeline knows is a ``Run``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sdeblend import Blend, Correction, Evaluation, Preference
from sdeblend.select import Selection, check_probabilities, member_scores, select_members
from stablediffusion.adapters.members import Members
from stablediffusion.adapters.soups import SOUPS
from stablediffusion.adapters.switch import check_unfused
from stablediffusion.blending.calls import Call
from stablediffusion.blending.denoiser import Denoiser
from stablediffusion.blending.guidance import after_guidance
from stablediffusion.blending.particles import Particles
from stablediffusion.blending.problems import inputs_of, pictures_of, same_problem
from stablediffusion.pipelines.components import lora_components
from stablediffusion.pipelines.families import paints_over
from stablediffusion.pipelines.schedulers import NoisyStep, noisy_move

Mode = Literal["mpa", "ls", "soup", "soup-factors"]
_PASSES = 16  # of one step; a loop of one's own that steps otherwise would keep them all


@dataclass
class Run:
    """One run of the pipeline.

    Attributes:
        step: which one of the times it has come to, from 0.
        time: the scheduler's timestep there.
        evaluations: of networks so far, one a member (or soup), call and image.
        images: B, once the scheduler has taken a step.
        serving: which member serves each image at each step, (n, B), for mode "ls".
        coefficients: of the blend in this run, once it is used.
        passes: since the scheduler's last step: the call, its evaluation, and what the pipeline got of it.
        pictures: that the pipeline starts from or a ControlNet looks at.
        particles: the images' weights.
        reason: why there are none.
        begun: the denoisers that were called.
    """

    step: int = -1
    time: float | None = None
    evaluations: int = 0
    images: int | None = None
    serving: Tensor | None = None
    coefficients: Tensor | None = None
    passes: list[tuple[Call, Evaluation, Tensor]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    particles: Particles | None = None
    reason: str | None = None
    begun: set[str] = field(default_factory=set)


class Engine:
    """Evaluates a blend wherever the pipeline it is attached to calls.

    Args:
        pipe: the pipeline.
        members: of the blend, for this pipeline; their switches must be borrowed as long as the engine runs.
        denoisers: the pipeline's, by component name, with the members on them.
        mode, correction, selection, seed: see ``stablediffusion.blend``.

    Attributes:
        pipe: the pipeline that runs, or ran last: another one over the same networks may.
        calls: calls that came through, of each denoiser.
        run: the last run.
        soup: what undoes the soup of the present preference.
    """

    def __init__(
        self,
        pipe: Any,
        members: Members,
        denoisers: Mapping[str, Denoiser],
        *,
        mode: Mode,
        correction: Correction | None,
        selection: Selection,
        seed: int,
    ) -> None:
        self.pipe = self._attached = pipe
        self.members, self.denoisers = members, dict(denoisers)
        self.mode, self.correction, self.selection, self.seed = mode, correction, selection, seed
        self.calls, self.run, self.soup = dict.fromkeys(denoisers, 0), Run(), ExitStack()
        self._prepared: tuple[int, list[Tensor]] = (0, [])
        self._loaded = _adapters(lora_components(pipe))
        self._warned = False

    def restart(self) -> None:
        """Begin a run of the pipeline: forget weights, selection and step count.

        Raises:
            ValueError: networks that are no longer as they were when the blend was attached.
        """
        components = lora_components(self._attached)
        check_unfused(self._attached, components.values())
        loaded = _adapters(components)
        if loaded != self._loaded:
            raise ValueError(
                f"a blend needs the adapters that were there when it was attached, {_listed(self._loaded)}, got "
                f"{_listed(loaded)}; load adapters before the 'with' block"
            )
        self.run = Run()

    def weigh(self, preference: Preference) -> None:
        """Blend by this preference from the next call on."""
        coefficients = preference.coefficients(self.members.names)
        if self.mode == "ls":
            check_probabilities(coefficients, len(self.members) + 1)
        if self.mode in SOUPS:
            self._mix(coefficients)
        self.preference, self.coefficients, self.run.serving = preference, coefficients, None

    def _mix(self, coefficients: Tensor) -> None:
        """Replace the soup by that of these coefficients."""
        if coefficients.ndim == 2:
            raise ValueError("a soup is one network and needs one preference, got one an image; use mode='mpa'")
        named = dict(zip(self.members.names, coefficients[1:].tolist(), strict=True))
        modules = [name for name in named if self.members[name].module is not None]
        if modules:
            raise ValueError(f"a soup averages LoRA members, got the whole network {modules[0]!r}; use mode='mpa'")
        self.soup.close()
        for switch in (self.members.switch, self.members.text_switch):
            self.soup.enter_context(SOUPS[self.mode](switch, named))

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate the blend in place of the denoiser of this name."""
        self.calls[name] += 1
        denoiser, run, coefficients = self.denoisers[name], self.run, self.coefficients
        if name not in run.begun:
            run.begun.add(name)
            denoiser.begin()
        this = denoiser.bind(args, kwargs)
        images = self._images(this.call)
        if self.mode in SOUPS:
            run.evaluations += images
            return original(*args, **kwargs)
        if self.mode == "ls" or coefficients.ndim == 2:
            this = denoiser.bind(args, kwargs, len(coefficients) if coefficients.ndim == 2 else images)
        x, t = this.sample, self._advance(this.call.time)
        if self.mode == "ls":
            value = member_scores(this, x, t, self._serving(this.images).to(x.device))
            run.evaluations += images
            return this.output(value.to(denoiser.last.dtype))
        evaluation = Blend(this, coefficients).evaluate(x, t)
        value = evaluation.score.to(denoiser.last.dtype)
        run.evaluations += len(evaluation.active) * images
        if self.correction is not None:
            if run.coefficients is not None and not torch.equal(run.coefficients, coefficients):
                self._refuse("the preference changed during the run, so the blend's weights are those of no one target")
            run.coefficients = coefficients
            if len(run.passes) == _PASSES:
                self._refuse(f"{type(self.pipe.scheduler).__name__} takes no step between calls of the denoiser")
            if run.reason is None:
                run.passes.append((this.call, evaluation, value))
        return this.output(value)

    def _images(self, call: Call) -> int:
        """Return how many images the rows of a call are of: of each one there are the branches of guidance.

        Once the scheduler has taken a step, what it stepped has told. Before, it is what the pipeline prepared, or else
        the period of the rows: the branches of an image have the same state.
        """
        for known in (self.run.images, self._preparation[0]):
            if known and call.rows % known == 0:
                return known
        sample = call.sample
        for count in range(1, call.rows):
            if call.rows % count == 0 and torch.equal(sample[count:], sample[:-count]):
                return count
        return call.rows

    def _advance(self, time: float) -> Tensor:
        """Return the pass's timestep; what is drawn a step is keyed on it, as Heun and guidance call more than once."""
        if time != self.run.time:
            self.run.step, self.run.time = self.run.step + 1, time
        return torch.tensor(time, dtype=torch.float64)

    def _serving(self, images: int) -> Tensor:
        """Return which member serves each image now, (B,); image i has its own draws."""
        run = self.run
        if run.serving is None or run.serving.shape[1] != images:
            steps = len(torch.as_tensor(self.pipe.scheduler.timesteps).unique())
            generators = [torch.Generator().manual_seed(self.seed + 7919 * i) for i in range(images)]
            generator = generators[0] if self.selection == "shared" else generators
            run.serving = select_members(self.coefficients, steps, images, self.selection, generator)
        if run.step >= len(run.serving):
            raise ValueError(
                f"members are drawn for the scheduler's {len(run.serving)} times, got another; use mode='mpa'"
            )
        return run.serving[run.step]

    def prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare the latents of a run; their number is that of its images."""
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        result = original(*args, **kwargs)
        first = result if isinstance(result, Tensor) else next((v for v in result if isinstance(v, Tensor)), None)
        self._prepared = (0 if first is None else len(first), pictures_of(arguments))
        return result

    @property
    def _preparation(self) -> tuple[int, list[Tensor]]:
        """The number of latents that the running pipeline prepared, 0 if unknown, and the pictures they are of."""
        return self._prepared if self.pipe is self._attached else (0, [])

    def look(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a ControlNet looks at."""
        given = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        seen = given.get("controlnet_cond")
        if self.correction is not None and self.run.particles is None and seen is not None:
            self.run.pictures += [seen] if isinstance(seen, Tensor) else list(seen)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's step and add its weights."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        output, timestep, sample = (given.get(name) for name in ("model_output", "timestep", "sample"))
        run = self.run
        passes, run.passes = run.passes, []
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor) or timestep is None:
            self._refuse(f"{type(self.pipe.scheduler).__name__} steps other things than a state by a prediction")
            return original(*args, **kwargs)
        run.images = len(sample)
        known = self.correction is not None and run.reason is None and passes
        move = self._move(float(timestep), given.get("eta")) if known else None
        result = original(*args, **kwargs)
        if move is None or not self._add(move, passes, output, sample):
            return result
        last = float(timestep) == float(self.pipe.scheduler.timesteps[-1])  # nothing follows that could use it
        ancestors = None if last or run.particles is None else run.particles.resample()
        if ancestors is None:
            return result
        ancestors = ancestors.to(sample.device)
        if isinstance(result, tuple):
            return tuple(v[ancestors] if isinstance(v, Tensor) and len(v) == len(sample) else v for v in result)
        result.prev_sample = result.prev_sample[ancestors]
        return result

    def _move(self, timestep: float, eta: float | None) -> NoisyStep | None:
        move = noisy_move(self.pipe.scheduler, timestep, eta)
        if paints_over(self.pipe):
            move = "inpainting with 4 channels replaces part of the image after each step"
        if isinstance(move, str):
            self._refuse(move)
            return None
        return move

    def _refuse(self, why: str) -> None:
        self.run.reason, self.run.passes = why, []
        if self.correction is not None and self.correction.mode == "resample":
            raise ValueError(f"correct='resample' needs the weights of every step, which do not exist: {why}")

    def _add(
        self, move: NoisyStep, passes: list[tuple[Call, Evaluation, Tensor]], output: Tensor, sample: Tensor
    ) -> bool:
        """Add the weights of one step; return whether they exist."""
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0) or 0.0)
        if rescale > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"guidance_rescale={rescale:g} acts after the blend and is not affine, so blending before and after "
                "guidance differ, and there is no certificate",
                stacklevel=2,
            )
        if not bool(output.isfinite().all()):
            raise FloatingPointError(
                f"the blended prediction must be finite, got NaN or infinity at t = {move.time:g}; use float32, "
                "or weights that extrapolate less"
            )
        final = None if rescale > 0 else after_guidance([(e, value) for _, e, value in passes], output)
        if final is None:
            self._refuse("the pipeline changed the prediction after guidance, by guidance_rescale or a rule of its own")
            return False
        if self.run.particles is None:
            self.run.particles = self._particles([call for call, *_ in passes], sample)
        self.run.particles.add(move, final)
        return True

    def _particles(self, calls: list[Call], sample: Tensor) -> Particles:
        """Return the images' weights at the start of a run, with draws of its own: runs do not depend on each other."""
        correction = self.correction
        assert correction is not None
        if correction.mode == "resample" and correction.generator is None:
            correction = replace(correction, generator=torch.Generator().manual_seed(self.seed))
        inputs = [*inputs_of(calls, sample), *self.run.pictures, *self._preparation[1]]
        groups = same_problem(inputs, self.coefficients, len(sample))
        return Particles(replace(correction, groups=groups), self.coefficients)

    def encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encode the prompt once for the base and once for each member with a text-encoder LoRA."""
        text_members, switch = self.members.text_members, self.members.text_switch
        embeddings = next(iter(self.denoisers.values())).embeddings
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given.get("prompt_embeds") is not None:
            raise ValueError(
                f"members that change the text encoder ({', '.join(m.name for m in text_members)}) need prompts as "
                "text, got prompt_embeds; pass prompt="
            )
        if self.run.step >= 0:
            embeddings.clear()
            self.run.step, self.run.time = -1, None
        switch.use()
        base = original(*args, **kwargs)
        try:
            for member in text_members:
                switch.use(str(member.adapter))
                embeddings.record(member.name, base, original(*args, **kwargs))
        finally:
            switch.use()
        return base


def _adapters(components: Mapping[str, Any]) -> set[str]:
    """Return the adapters of some networks."""
    return {adapter for module in components.values() for adapter in getattr(module, "peft_config", {})}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
