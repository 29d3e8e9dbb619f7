"""What can be turned and read while a blend is attached."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdeblend import Certificate, Preference
from stablediffusion.adapters.members import Members
from stablediffusion.blending.engine import Engine
from stablediffusion.blending.particles import EffectiveSamples, Particles


class Knobs:
    """The preference of an attached blend, to change; and what the last run of the pipeline says of its images.

    Args:
        engine: does the work.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def preference(self) -> Preference:
        """The weights and the strength; assign to change them from the next call on."""
        return self._engine.preference

    @preference.setter
    def preference(self, preference: Preference | Mapping[str, float]) -> None:
        self._engine.weigh(preference if isinstance(preference, Preference) else Preference(preference))

    @property
    def members(self) -> Members:
        """The members of the blend."""
        return self._engine.members

    @property
    def calls(self) -> int:
        """Denoiser calls that came through the blend."""
        return sum(self._engine.calls.values())

    @property
    def evaluations(self) -> int:
        """Evaluations of networks, one a member (or soup), call and image of the last run."""
        return self._engine.run.evaluations

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
        particles = self._particles
        return [] if particles is None else particles.weights.certificates()

    @property
    def ess(self) -> EffectiveSamples | None:
        """Both effective sample sizes of the last run, in images, if they were particles of one problem."""
        sizes = self.effective_samples
        return sizes[0] if len(sizes) == 1 else None

    @property
    def effective_samples(self) -> list[EffectiveSamples]:
        """Both effective sample sizes, one pair a certificate, in the order of ``certificates``."""
        particles = self._particles
        return [] if particles is None else particles.effective_samples()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the images must know: a correction that is partial, by tempering or active interval."""
        particles = self._engine.run.particles
        return () if particles is None else particles.weights.correction.notes

    @property
    def reason(self) -> str | None:
        """Why the last run has no certificate, or None."""
        engine = self._engine
        if engine.correction is None:
            return f"mode {engine.mode!r} has no certificate" if engine.mode != "mpa" else "correct=None was asked for"
        return engine.run.reason or ("nothing has run yet" if engine.run.particles is None else None)

    @property
    def log_weights(self) -> Tensor | None:
        """log W of each image since the last resampling, float64 (B,), or None; see ``reason``."""
        particles = self._particles
        return None if particles is None else particles.weights.residual.clone()

    @property
    def nats(self) -> Tensor | None:
        """-log W of each image's path, float64 (B,), or None; see ``reason``.

        Without negative coefficients its expectation bounds the KL divergence from the target, even where images are
        too few to estimate the certificate's log E[W].
        """
        particles = self._particles
        return None if particles is None else -particles.weights.path

    @property
    def resampled(self) -> list[int]:
        """The steps after which images were redrawn."""
        particles = self._engine.run.particles
        return [] if particles is None else list(particles.weights.resampled)

    @property
    def disagreement(self) -> Tensor | None:
        """Nats that each pair of (base, members) adds at each step, float64 (n, 1 + m, 1 + m), mean over images.

        Symmetric, with half of a pair's nats on each side of the diagonal: the sum of a step is its entry of the
        certificate's profile (of one problem).
        """
        particles = self._particles
        return None if particles is None else torch.stack(particles.pairs)

    @property
    def _particles(self) -> Particles | None:
        """The weights of the last run's images, if they mean anything."""
        return None if self.reason else self._engine.run.particles
