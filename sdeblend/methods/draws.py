"""Random numbers that depend on (prompt, seed, candidate, step) alone: the same for every method, whatever it draws.

A counter-based generator has no state: the numbers of step n of seed s are a function of (key, n, s), so methods
that evaluate, branch or resample differently still see the same start and the same step noise, a batch may be cut
anywhere, and a run may start in the middle. Philox 4x32-10 maps a 128-bit counter and a 64-bit key to four 32-bit
words; Box-Muller makes four normal numbers of them. The key is a hash of the run's seed and the prompt, the counter
is (block of four numbers, step, seed, candidate). All rows of a step are computed at once: for thousands of small
samples two hundred times faster than one generator a sample.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Box and Muller 1958.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from time import perf_counter
from typing import Final

import numpy as np
import torch
from torch import Tensor

MAX_SEED: Final = 2**32
# Small states keep their noise from one method to the next; images are drawn again.
KEPT_BYTES: Final = 1 << 26
_MASK: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return Philox 4x32-10 of counters under a key.

    Args:
        counter: four arrays of uint64 below 2^32, of shapes that broadcast.
        key: two words below 2^32.

    Returns:
        four arrays of uint64 below 2^32.

    Source: Salmon et al. 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> _SHIFT) ^ c1 ^ np.uint64(k0), (first >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & _MASK, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) % MAX_SEED, (k1 + _WEYL[1]) % MAX_SEED
    return c0, c1, c2, c3


def _normals(words: Words) -> np.ndarray:
    """Return standard normal numbers, float64 (..., 4), from four words."""
    low, high, other_low, other_high = ((word.astype(np.float64) + 0.5) / MAX_SEED for word in words)
    out = np.empty((*low.shape, 4))
    for place, (radius, angle) in enumerate(((low, high), (other_low, other_high))):
        length, turn = np.sqrt(-2 * np.log(radius)), 2 * math.pi * angle
        np.multiply(length, np.cos(turn), out=out[..., 2 * place])
        np.multiply(length, np.sin(turn), out=out[..., 2 * place + 1])
    return out


def clock() -> float:
    """Return seconds, from any fixed time, once a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


class Draws:
    """The random numbers of some seeds of one prompt.

    Args:
        seed: of the whole run.
        prompt: what is sampled for; "" where there is nothing to say.
        seeds: one a sample, 0 to 2^32 - 1.

    Attributes:
        seconds: spent on drawing so far. Which method finds numbers kept depends on the order of methods, so that none
            is charged for them.

    Raises:
        ValueError: no seed, or one outside its range.
    """

    def __init__(self, seed: int, prompt: str, seeds: Sequence[int]) -> None:
        self.seed, self.prompt, self.seeds = int(seed), prompt, tuple(seeds)
        if not self.seeds or not all(0 <= s < MAX_SEED for s in self.seeds):
            raise ValueError(f"seeds must be at least one, each from 0 to 2^32 - 1, got {list(self.seeds[:3])}")
        digest = hashlib.sha256(f"{self.seed}|{prompt}".encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        self._kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._room = KEPT_BYTES
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, step: int, event: Sequence[int], candidates: int = 1) -> Tensor:
        """Return the normal numbers of a step.

        Args:
            step: 0 for the start, n + 1 for step n.
            event: shape of a sample.
            candidates: how many a seed; the first is what other methods see.

        Returns:
            float64 (len(seeds) * candidates, *event), the candidates of a seed side by side; not to be modified.
        """
        place = (step, tuple(event))
        if candidates == 1 and place in self._kept:
            return self._kept[place]
        began, size = clock(), math.prod(event)
        blocks = np.arange(-(-size // 4), dtype=np.uint64)
        seeds = np.repeat(np.array(self.seeds, dtype=np.uint64), candidates)[:, None]
        branches = np.tile(np.arange(candidates, dtype=np.uint64), len(self.seeds))[:, None]
        shape = np.broadcast_shapes(seeds.shape, blocks.shape)
        words = philox(
            tuple(np.broadcast_to(c, shape) for c in (blocks, np.uint64(step), seeds, branches)),  # type: ignore[arg-type]
            self._key,
        )
        flat = _normals(words).reshape(len(seeds), -1)[:, :size]
        out = torch.from_numpy(np.ascontiguousarray(flat)).reshape(len(seeds), *event)
        if candidates == 1 and out.nbytes <= self._room:
            self._kept[place], self._room = out, self._room - out.nbytes
        self.seconds += clock() - began
        return out

    def start(self, like: Tensor, scale: float, candidates: int = 1) -> Tensor:
        """Return starts of standard deviation ``scale``.

        Args:
            like: a tensor (*event) of the dtype and on the device wanted.
            scale: the prior's.
            candidates: how many a seed.

        Returns:
            (len(seeds) * candidates, *event).
        """
        return (self.normal(0, like.shape, candidates) * scale).to(like)

    def noise(self, candidates: int = 1) -> SeedNoise:
        """Return the step noise as a ``sdeblend.noise.NoiseSource``."""
        return SeedNoise(self, candidates)

    def generator(self, stream: str) -> torch.Generator:
        """Return a generator for what belongs to the whole batch (ancestors, members drawn), by its name."""
        text = f"{self.seed}|{self.prompt}|{self.seeds[0]}|{len(self.seeds)}|{stream}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class SeedNoise:
    """The step noise of ``Draws``.

    Args:
        draws: of which seeds.
        candidates: rows a seed, side by side.
    """

    def __init__(self, draws: Draws, candidates: int = 1) -> None:
        self.draws, self.candidates = draws, candidates

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        """Return z of step n, shaped as ``like``."""
        rows = len(self.draws) * self.candidates
        if len(like) != rows:
            raise ValueError(f"the noise of {rows} rows was asked for {len(like)}; draw for as many candidates")
        return self.draws.normal(n + 1, like.shape[1:], self.candidates).to(like, copy=True)
