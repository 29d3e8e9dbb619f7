"""Certificate and resampling inside a pipeline's own run: the core's ``Weights``, fed by the scheduler's steps.

At each scheduler step the members' guided predictions are known. With b the slope on them and g the noise of that
step (``schedulers.noisy_move``),

    log W += -b^2 spread(guided predictions) / (2 g^2).

Images of one prompt (and one preference) are the particles of one problem.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdeblend.blend import Evaluation, combine
from sdeblend.certificate import effective_sample_size
from sdeblend.correct import Correction, Weights
from stablediffusion.pipelines.inputs import guided
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
        self._share = groups.bincount()[groups] / len(groups)  # of an image's problem among the images
        self.pairs: list[Tensor] = []

    def add(self, move: NoisyStep, evaluation: Evaluation) -> None:
        """Add one step with the guided members of its evaluation."""
        pairs = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.pairs.append(pairs)
        if not move.noise:
            self.weights.skip()
            return
        precision = (move.slope / move.noise) ** 2
        active = torch.tensor(evaluation.active)
        mean = torch.tensordot(self.weights.undo() * self._share, evaluation.pair_spread(), 1).cpu()
        pairs[active[:, None], active] = mean * precision / 2
        self.weights.add(evaluation.spread() * precision, 1.0, move.time)

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


def after_guidance(evaluation: Evaluation, guidance_scale: float) -> Evaluation:
    """Return the evaluation after classifier-free guidance: members (K, B, G, *event) -> (K, B, *event).

    Args:
        evaluation: G = 2, negative prompt first, or G = 1.
        guidance_scale: g.
    """
    members = guided(evaluation.members, guidance_scale, 2)
    return Evaluation(combine(members, evaluation.coefficients), members, evaluation.coefficients, evaluation.active)


def same_problem(embeddings: Any, coefficients: Tensor, images: int) -> Tensor:
    """Return which images share prompt and preference, long (B,), numbered in order of appearance.

    Args:
        embeddings: prompt embeddings, (G B, ...), or None.
        coefficients: (K,) or (B, K).
        images: B.
    """
    groups = torch.zeros(images, dtype=torch.long)
    keys: list[tuple[Tensor, Tensor]] = []
    for i in range(images):
        row = embeddings[i::images] if isinstance(embeddings, Tensor) else torch.zeros(1)
        weights = coefficients[i] if coefficients.ndim == 2 else coefficients
        for g, (known_row, known_weights) in enumerate(keys):
            if torch.equal(row, known_row) and torch.equal(weights, known_weights):
                groups[i] = g
                break
        else:
            groups[i] = len(keys)
            keys.append((row, weights))
    return groups
