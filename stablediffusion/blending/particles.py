"""Certificate and resampling inside a pipeline's own run: the core's ``Weights``, fed by the scheduler's steps.

At each scheduler step the members' guided predictions are known. With b the slope of the step on what the scheduler
gets and g its noise (``schedulers.noisy_move``),

    log W += -b^2 spread(guided predictions) / (2 g^2).

Images of one prompt (and one preference) are the particles of one problem.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdeblend.blend import Evaluation
from sdeblend.certificate import effective_sample_size
from sdeblend.correct import Correction, Weights
from stablediffusion.pipelines.schedulers import NoisyStep


class EffectiveSamples(NamedTuple):
    """How many independent images of the target those of one problem are worth, between 0 and their number.

    Attributes:
        plain: of the blend's own images under the full weights, (sum W)^2 / sum W^2; estimated from the survivors if
            the run was resampled.
        resampled: of the images returned, under ``log_weights``; the same number if nothing was resampled and no
            weight was tempered or left out.
    """

    plain: float
    resampled: float


class Particles:
    """The weights of the images of one pipeline run.

    Args:
        correction: how they are used, and which images are particles of one problem.
        coefficients: of the blend, (K,) or (B, K).

    Attributes:
        pairs: one (K, K) a step: what each pair of members adds to the mean of -log W over the blend's own paths, in
            nats; of one problem, its sum is the step's entry of the certificate's profile.
    """

    def __init__(self, correction: Correction, coefficients: Tensor) -> None:
        groups = correction.groups
        assert groups is not None
        self.weights = Weights(correction, len(groups), groups.device, bool((coefficients >= 0).all()))
        self.count = coefficients.shape[-1]
        self._share = groups.bincount()[groups].double() / len(groups)  # of an image's problem among the images
        self.pairs: list[Tensor] = []

    def add(self, step: NoisyStep, evaluation: Evaluation) -> None:
        """Add one step with the guided members of its evaluation."""
        pairs = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.pairs.append(pairs)
        if not step.noise:
            self.weights.skip()
            return
        active = torch.tensor(evaluation.active)
        mean = torch.tensordot(self.weights.undo() * self._share, evaluation.pair_spread().to(self._share), 1)
        pairs[active[:, None], active] = mean * step.slope**2 / (2 * step.noise**2)
        self.weights.add(evaluation.spread() * step.slope**2, step.noise**2, step.time)

    def effective_samples(self) -> list[EffectiveSamples]:
        """Return the effective sample sizes without and with resampling, one pair a problem."""
        return [
            EffectiveSamples(
                certificate.ess_fraction * len(certificate.per_sample),
                float(effective_sample_size(self.weights.residual[index])),
            )
            for certificate, index in zip(self.weights.certificates(), self.weights.particles, strict=True)
        ]

    def resample(self) -> Tensor | None:
        """Return the ancestors (B,) if any group was resampled."""
        return self.weights.resample(len(self.pairs))
