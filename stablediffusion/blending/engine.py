"""What runs in place of a pipeline's denoiser, scheduler step and prompt encoder while a blend is attached.

Each denoiser call is one evaluation of the core's ``Blend``, or of one member an image, over the call's ``Pass``; each
scheduler step adds the weights of that evaluation (``particles``). What one run of the pipeline knows is a ``Run``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sdeblend import Blend, Correction, Evaluation, Preference
from sdeblend.select import Selection, check_probabilities, member_scores, select_members
from stablediffusion.adapters.members import Members
from stablediffusion.adapters.soups import SOUPS
from stablediffusion.blending.denoiser import Denoiser, Pass
from stablediffusion.blending.particles import Particles, after_guidance, same_problem
from stablediffusion.pipelines.families import paints_over
from stablediffusion.pipelines.schedulers import NoisyStep, noisy_move

Mode = Literal["mpa", "ls", "soup", "soup-factors"]


@dataclass
class Run:
    """One run of the pipeline.

    Attributes:
        step: which one of the times it has come to, from 0.
        time: the scheduler's timestep there.
        evaluations: of networks so far, one a member (or soup) and image.
        serving: which member serves each image at each step, (n, B), for mode "ls".
        evaluation: the last one, until the scheduler has taken its step.
        prompts: embeddings of the last call, (G B, ...), if it had any.
        particles: the images' weights.
        reason: why there are none.
    """

    step: int = -1
    time: float | None = None
    evaluations: int = 0
    serving: Tensor | None = None
    evaluation: Evaluation | None = None
    prompts: Any = None
    particles: Particles | None = None
    reason: str | None = None


class Engine:
    """Evaluates a blend wherever the pipeline it is attached to calls.

    Args:
        pipe: the pipeline.
        members: of the blend, for this pipeline; their switches must be borrowed as long as the engine runs.
        denoiser: the pipeline's, with the members on it.
        mode, correction, selection, seed: see ``stablediffusion.blend``.

    Attributes:
        calls: denoiser calls that came through.
        run: the last run.
        soup: what undoes the soup of the present preference.
    """

    def __init__(
        self,
        pipe: Any,
        members: Members,
        denoiser: Denoiser,
        *,
        mode: Mode,
        correction: Correction | None,
        selection: Selection,
        seed: int,
    ) -> None:
        self.pipe, self.members, self.denoiser = pipe, members, denoiser
        self.mode, self.correction, self.selection, self.seed = mode, correction, selection, seed
        self.calls, self.run, self.soup = 0, Run(), ExitStack()
        self._warned = False

    def restart(self) -> None:
        """Begin a run of the pipeline: forget weights, selection and step count."""
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

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate the blend in place of the denoiser."""
        self.calls += 1
        guides = getattr(self.pipe, "do_classifier_free_guidance", False)
        this = self.denoiser.bind(args, kwargs, 2 if guides else 1)
        x, run = this.sample, self.run
        if self.mode in SOUPS:
            run.evaluations += len(x)
            return original(*args, **kwargs)
        t = self._advance(this)
        if self.mode == "ls":
            value = member_scores(this, x, t, self._serving(len(x)).to(x.device))
            run.evaluations += len(x)
        else:
            run.prompts = this.arguments.get("encoder_hidden_states")
            run.evaluation = Blend(this, self.coefficients).evaluate(x, t)
            value = run.evaluation.score
            run.evaluations += len(run.evaluation.active) * len(x)
        return this.output(value)

    def _advance(self, this: Pass) -> Tensor:
        """Return the pass's timestep; what is drawn a step is keyed on it, as Heun and guidance call more than once."""
        time = this.time
        if time != self.run.time:
            self.run.step, self.run.time = self.run.step + 1, time
        return torch.tensor(time, dtype=torch.float64)

    def _serving(self, images: int) -> Tensor:
        """Return which member serves each image now, (B,); image i has its own draws."""
        run = self.run
        if self.coefficients.ndim == 2 and len(self.coefficients) != images:
            raise ValueError(f"weights for {len(self.coefficients)} images need a batch of as many, got {images}")
        if run.serving is None:
            steps = len(torch.as_tensor(self.pipe.scheduler.timesteps).unique())
            generators = [torch.Generator().manual_seed(self.seed + 7919 * i) for i in range(images)]
            generator = generators[0] if self.selection == "shared" else generators
            run.serving = select_members(self.coefficients, steps, images, self.selection, generator)
        if run.step >= len(run.serving):
            raise ValueError(
                f"members are drawn for the scheduler's {len(run.serving)} times, got another; use mode='mpa'"
            )
        return run.serving[run.step]

    def step(
        self, original: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the scheduler's step and add its weights."""
        evaluation, self.run.evaluation = self.run.evaluation, None
        move = None if evaluation is None or self.correction is None else self._move(timestep, kwargs)
        result = original(output, timestep, sample, *args, **kwargs)
        if move is None or evaluation is None or not self._add(move, evaluation, output):
            return result
        last = float(timestep) == float(self.pipe.scheduler.timesteps[-1])  # nothing follows that could use it
        ancestors = None if last or self.run.particles is None else self.run.particles.resample()
        if ancestors is None:
            return result
        if isinstance(result, tuple):
            return tuple(v[ancestors] if isinstance(v, Tensor) and len(v) == len(sample) else v for v in result)
        result.prev_sample = result.prev_sample[ancestors]
        return result

    def _move(self, timestep: Any, kwargs: dict[str, Any]) -> NoisyStep | None:
        move = noisy_move(self.pipe.scheduler, float(timestep), kwargs.get("eta"))
        if paints_over(self.pipe):
            move = "inpainting with 4 channels replaces part of the image after each step"
        if isinstance(move, str):
            self._refuse(move)
            return None
        return move

    def _refuse(self, why: str) -> None:
        self.run.reason = why
        if self.correction is not None and self.correction.mode == "resample":
            raise ValueError(f"correct='resample' needs the weights of every step, which do not exist: {why}")

    def _add(self, move: NoisyStep, evaluation: Evaluation, output: Tensor) -> bool:
        """Add the weights of one step; return whether they exist."""
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0) or 0.0)
        if rescale > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"guidance_rescale={rescale:g} acts after the blend and is not affine, so blending before and after "
                "guidance differ, and there is no certificate",
                stacklevel=2,
            )
        final = after_guidance(evaluation, float(getattr(self.pipe, "guidance_scale", 1.0)))
        expected = final.score.to(output.dtype)
        error = float((expected - output).double().norm() / output.double().norm().clamp_min(1e-30))
        if error != error:
            raise FloatingPointError(
                f"the blended prediction must be finite, got NaN or infinity at t = {move.time:g}; use float32, "
                "or weights that extrapolate less"
            )
        if not error < (1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2):
            self._refuse("the pipeline changed the prediction after guidance, by guidance_rescale or a rule of its own")
            return False
        if self.run.particles is None:
            self.run.particles = self._particles(len(output), output.device)
        self.run.particles.add(move, final)
        return True

    def _particles(self, images: int, device: torch.device) -> Particles:
        """Return the images' weights at the start of a run, with draws of its own: runs do not depend on each other."""
        correction = self.correction
        assert correction is not None
        if correction.mode == "resample" and correction.generator is None:
            correction = replace(correction, generator=torch.Generator().manual_seed(self.seed))
        groups = same_problem(self.run.prompts, self.coefficients, images).to(device)
        return Particles(replace(correction, groups=groups), self.coefficients)

    def encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encode the prompt once for the base and once for each member with a text-encoder LoRA."""
        text_members, switch, embeddings = self.members.text_members, self.members.text_switch, self.denoiser.embeddings
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
