"""What can be turned and read while a blend is attached, and what runs in place of the denoiser.

Each denoiser call is one evaluation of the core's ``Blend`` (or ``OneMemberPerStep``) over the call's
``DenoiserStack``; each scheduler step adds the weights of that evaluation (``particles``).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from sdeblend.blend import Blend, Evaluation, Preference
from sdeblend.certificate import Certificate
from sdeblend.correct import Correction
from sdeblend.select import OneMemberPerStep, Selection, check_probabilities
from sdeblend.steps import Move
from stablediffusion.adapters.members import Members
from stablediffusion.adapters.switch import SOUPS
from stablediffusion.blending.denoiser import DenoiserStack
from stablediffusion.blending.particles import EffectiveSamples, Particles, guided, same_problem
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.schedulers import noisy_move, schedule_of

Mode = Literal["mpa", "ls", "soup", "soup-factors"]


class Knobs:
    """What can be turned and read while a blend is attached.

    Attributes:
        calls: denoiser calls that came through the blend.
        evaluations: of networks, one a member (or soup) and image, over all calls of the last run.
    """

    def __init__(
        self,
        pipe: Any,
        members: Members,
        mode: Mode,
        correction: Correction | None,
        selection: Selection,
        seed: int,
        stack: DenoiserStack,
        soup: ExitStack,
    ) -> None:
        self.pipe, self.members, self.mode, self.seed = pipe, members, mode, seed
        self.calls, self.evaluations = 0, 0
        self._correction, self._selection_method, self._stack, self._soup = correction, selection, stack, soup
        self._evaluation: Evaluation | None = None
        self._warned = False
        self.follow_scheduler: Callable[[], None] = lambda: None
        self.restart()

    def restart(self) -> None:
        """Begin a run of the pipeline: forget weights, selection and step count."""
        self._place = -1
        self._seen: float | None = None
        self._selection: OneMemberPerStep | None = None
        self._particles: Particles | None = None
        self._reason: str | None = None
        self.evaluations = 0

    @property
    def preference(self) -> Preference:
        """The weights and the strength; assign to change them from the next call on."""
        return self._preference

    @preference.setter
    def preference(self, preference: Preference | Mapping[str, float]) -> None:
        chosen = preference if isinstance(preference, Preference) else Preference(preference)
        coefficients = chosen.coefficients(self.members.names)
        if self.mode == "ls":
            check_probabilities(coefficients, len(self._stack))
        if self.mode in SOUPS:
            self._cook(coefficients)
        self._preference, self._coefficients = chosen, coefficients
        self._blend = Blend(self._stack, coefficients)
        self._selection = None

    def _cook(self, coefficients: Tensor) -> None:
        if coefficients.ndim == 2:
            raise ValueError("a soup is one network and needs one preference, got one an image; use mode='mpa'")
        named = dict(zip(self.members.names, coefficients[1:].tolist(), strict=True))
        modules = [name for name in named if self.members[name].module is not None]
        if modules:
            raise ValueError(f"a soup averages LoRA members, got the whole network {modules[0]!r}; use mode='mpa'")
        self._soup.close()
        for switch in (self.members.switch, self.members.text_switch):
            self._soup.enter_context(SOUPS[self.mode](switch, named))

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the last run if its images were particles of one problem, else None; see ``reason``."""
        certificates = self.certificates
        return certificates[0] if len(certificates) == 1 else None

    @property
    def certificates(self) -> list[Certificate]:
        """One certificate a prompt (and preference) of the last run; empty if ``reason`` says why.

        From few images log E[W] cannot be estimated. Without negative coefficients the value is then -E[log W], an
        upper bound; with them the certificate is not ``reliable``, and its ``warning`` says so.
        """
        return [] if self.reason or self._particles is None else self._particles.weights.certificates()

    @property
    def ess(self) -> EffectiveSamples | None:
        """Both effective sample sizes of the last run, in images, if they were particles of one problem."""
        sizes = self.effective_samples
        return sizes[0] if len(sizes) == 1 else None

    @property
    def effective_samples(self) -> list[EffectiveSamples]:
        """Both effective sample sizes, one pair a certificate, in the order of ``certificates``."""
        return [] if self.reason or self._particles is None else self._particles.effective_samples()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the images must know: a correction that is partial, by tempering or active interval."""
        return () if self._particles is None else self._particles.weights.correction.notes

    @property
    def reason(self) -> str | None:
        """Why the last run has no certificate, or None."""
        if self._correction is None:
            return f"mode {self.mode!r} has no certificate" if self.mode != "mpa" else "correct=None was asked for"
        if self._particles is None:
            return self._reason or "nothing has run yet"
        return self._particles.reason

    @property
    def log_weights(self) -> Tensor | None:
        """log W of each image since the last resampling, float64 (B,), or None; see ``reason``."""
        return None if self.reason or self._particles is None else self._particles.weights.residual.clone()

    @property
    def nats(self) -> Tensor | None:
        """-log W of each image's path, float64 (B,), or None; see ``reason``.

        Without negative coefficients its expectation bounds the KL divergence from the target, even where images are
        too few to estimate the certificate's log E[W].
        """
        return None if self.reason or self._particles is None else -self._particles.weights.path

    @property
    def resampled(self) -> list[int]:
        """The steps after which images were redrawn."""
        return [] if self._particles is None else list(self._particles.weights.resampled)

    @property
    def disagreement(self) -> Tensor | None:
        """Nats that each pair of (base, members) adds at each step, float64 (n, 1 + m, 1 + m), mean over images.

        Symmetric, with half of a pair's nats on each side of the diagonal: the sum of a step is its entry of the
        certificate's profile (of one problem).
        """
        return None if self.reason or self._particles is None else torch.stack(self._particles.pairs)

    # What the patched pipeline calls.

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate the blend in place of the denoiser."""
        self.calls += 1
        self.follow_scheduler()
        branches = 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 1
        x = self._stack.bind(args, kwargs, branches)
        if self.mode in SOUPS:
            self.evaluations += len(x)
            return original(*args, **kwargs)
        self._advance(self._stack.arguments["timestep"])
        place = torch.tensor(float(self._place), dtype=torch.float64)
        if self.mode == "ls":
            self._selection = self._selection or self._select(len(x))
            value = self._selection(x, place)
            self.evaluations += len(x)
        else:
            evaluation = self._blend.evaluate(x, place)
            self._evaluation, value = evaluation, evaluation.score
            self.evaluations += len(evaluation.active) * len(x)
        sample = self._stack.sample_of(value).to(x.dtype)
        kind = self._stack.output_class
        return (sample,) if kind is None else kind(sample=sample)

    def _advance(self, timestep: Any) -> None:
        # Heun and guidance call more than once at a time: what is drawn a step is keyed on the time.
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if value != self._seen:
            self._place, self._seen = self._place + 1, value

    def _select(self, images: int) -> OneMemberPerStep:
        steps = len(torch.as_tensor(self.pipe.scheduler.timesteps).unique())
        generators = [torch.Generator().manual_seed(self.seed + 7919 * i) for i in range(images)]
        shared = self._selection_method == "shared"
        return OneMemberPerStep(
            self._stack,
            self._coefficients,
            torch.arange(steps, dtype=torch.float64),
            images,
            method=self._selection_method,
            generator=generators[0] if shared else generators,
        )

    def step(
        self, original: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the scheduler's step and add its weights."""
        evaluation, self._evaluation = self._evaluation, None
        move = None if evaluation is None or self._correction is None else self._move(timestep, kwargs)
        result = original(output, timestep, sample, *args, **kwargs)
        if move is None or evaluation is None:
            return result
        particles = self._weigh(move, evaluation, output)
        if particles is None or float(timestep) == float(self.pipe.scheduler.timesteps[-1]):
            return result  # never resample on the last step
        ancestors = particles.resample()
        if ancestors is None:
            return result
        if isinstance(result, tuple):
            return tuple(v[ancestors] if isinstance(v, Tensor) and len(v) == len(sample) else v for v in result)
        result.prev_sample = result.prev_sample[ancestors]
        return result

    def _move(self, timestep: Any, kwargs: dict[str, Any]) -> Move | None:
        schedule, _ = schedule_of(self.pipe)
        move = noisy_move(self.pipe.scheduler, schedule, float(timestep), float(kwargs.get("eta", 0.0)))
        config: Any = denoiser_of(self.pipe)[1].config
        if "Inpaint" in type(self.pipe).__name__ and config.in_channels == 4:
            move = "inpainting with 4 channels replaces part of the image after each step"
        if isinstance(move, str):
            self._refuse(move)
            return None
        return move

    def _refuse(self, why: str) -> None:
        self._reason = why
        if self._particles is not None:
            self._particles.reason = why
        if self._correction is not None and self._correction.mode == "resample":
            raise ValueError(f"correct='resample' needs the weights of every step, which do not exist: {why}")

    def _weigh(self, move: Move, evaluation: Evaluation, output: Tensor) -> Particles | None:
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0) or 0.0)
        if rescale > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"guidance_rescale={rescale:g} acts after the blend and is not affine, so blending before and after "
                "guidance differ, and there is no certificate",
                stacklevel=2,
            )
        final = guided(evaluation, float(getattr(self.pipe, "guidance_scale", 1.0)))
        expected = final.score.to(output.dtype)
        error = float((expected - output).double().norm() / output.double().norm().clamp_min(1e-30))
        if error != error:
            raise FloatingPointError(
                f"the blended prediction must be finite, got NaN or infinity at t = {float(move.t):g}; use float32, "
                "or weights that extrapolate less"
            )
        if not error < (1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2):
            self._refuse("the pipeline changed the prediction after guidance, by guidance_rescale or a rule of its own")
            return None
        if self._particles is None:
            schedule, prediction = schedule_of(self.pipe)
            embeddings = self._stack.arguments.get("encoder_hidden_states")
            groups = same_problem(embeddings, self._coefficients, len(output)).to(output.device)
            assert self._correction is not None
            self._particles = Particles(self._own(self._correction), self._coefficients, groups, schedule, prediction)
        self._particles.add(move, final)
        return self._particles

    def _own(self, correction: Correction) -> Correction:
        """Return the correction with a generator of this run, so that runs do not depend on each other."""
        if correction.mode == "certify" or correction.generator is not None:
            return correction
        generator = torch.Generator().manual_seed(self.seed)
        return Correction("resample", correction.threshold, correction.tempering, correction.active, generator)

    def encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encode the prompt once for the base and once for each member with a text-encoder LoRA."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given.get("prompt_embeds") is not None:
            names = ", ".join(member.name for member in self.members.text_members)
            raise ValueError(
                f"members that change the text encoder ({names}) need prompts as text, got prompt_embeds; pass prompt="
            )
        if self._place >= 0:
            self._stack.embeddings.clear()
            self._place, self._seen = -1, None
        switch = self.members.text_switch
        switch.use()
        base = original(*args, **kwargs)
        try:
            for member in self.members.text_members:
                switch.use(str(member.adapter))
                self._stack.embeddings.record(member.name, base, original(*args, **kwargs))
        finally:
            switch.use()
        return base
