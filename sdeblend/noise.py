"""Noise sources: who draws z, from which generator, and how a run is repeated on the same noise.

A source is called once a step as ``source(n, t, s, like)`` and returns z of unit variance, shaped as
``like``; for the moves of a corrector as ``source(n, t, t, like)``, n after those of all steps. Nothing in this
library draws from the global generator.

* BatchNoise: one generator for the batch; the fastest.
* PerSampleNoise: one generator a sample; results do not depend on the batch size.
* ReplayNoise: given tensors.
* ``sdeblend.brownian``: increments of one Brownian path, so that nested grids see the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Gives the noise of step n from t to s."""

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor, /) -> Tensor: ...


Noise = torch.Generator | Sequence[torch.Generator] | NoiseSource


class BatchNoise:
    """One generator for the whole batch; it draws in memory order, so a state of another layout sees other draws.

    Args:
        generator: on the device of the state.
    """

    def __init__(self, generator: torch.Generator) -> None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"BatchNoise needs a torch.Generator, got {type(generator).__name__}; seed one for the run")
        self.generator = generator

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        # empty_like keeps the layout of the state; filling it in place saves a copy.
        return torch.empty_like(like).normal_(generator=self.generator)


class PerSampleNoise:
    """One generator a sample: row i depends on generator i alone.

    Args:
        generators: B generators.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        if len(self.generators) != len(like):
            raise ValueError(f"a batch of {len(like)} samples needs as many generators, got {len(self.generators)}")
        rows = [
            torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device).to(like.device)
            for g in self.generators
        ]
        return torch.stack(rows)


class ReplayNoise:
    """Noise given in advance.

    Args:
        draws: one tensor a step with noise, each shaped as the state.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = list(draws)

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        if n >= len(self.draws) or self.draws[n].shape != like.shape:
            got = f"{len(self.draws)} draws" if n >= len(self.draws) else f"shape {tuple(self.draws[n].shape)}"
            raise ValueError(
                f"the noise of step {n} must have shape {tuple(like.shape)}, got {got}; record it on this run's grid"
            )
        return self.draws[n].to(like)


class RowsOfNoise:
    """The noise of some rows of a larger batch, as they would see it there.

    Args:
        source: of the batch.
        rows: which, long (n,).
        batch: its size.
    """

    def __init__(self, source: NoiseSource, rows: Tensor, batch: int) -> None:
        self.source, self.rows, self.batch = source, rows, batch

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        return self.source(n, t, s, like.new_empty(self.batch, *like.shape[1:]))[self.rows]


def noise_source(noise: Noise) -> NoiseSource:
    """Return a source for what the user gave: a generator, one generator a sample, or a source.

    Raises:
        TypeError: for anything else, None included: the global generator is never used.
    """
    if isinstance(noise, torch.Generator):
        return BatchNoise(noise)
    if isinstance(noise, (list, tuple)) and noise and all(isinstance(g, torch.Generator) for g in noise):
        return PerSampleNoise(noise)
    if callable(noise):
        return noise
    raise TypeError(
        f"noise must be a torch.Generator, a list of them or a noise source, got {type(noise).__name__}; "
        "pass torch.Generator().manual_seed(seed)"
    )


def generator_beside(noise: Noise, offset: int, instead: str) -> torch.Generator:
    """Return a generator for what a run draws beside its noise, seeded from the noise's own (the first of several).

    Args:
        noise: of the run.
        offset: tells what is drawn apart.
        instead: what to pass where the noise has no seed.

    Raises:
        ValueError: a noise source, which has none.
    """
    first = noise[0] if isinstance(noise, Sequence) else noise
    if not isinstance(first, torch.Generator):
        raise ValueError(f"what a run draws beside its noise needs a generator, got a noise source; pass {instead}")
    return torch.Generator().manual_seed((first.initial_seed() + offset) % 2**63)
