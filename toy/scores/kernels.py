"""Three ways to evaluate the scores of several Gaussian mixtures at many points, fast.

A mixture with weights pi_k, means m_k and precisions P_k has, in coordinates z = x - centre, b_k = P_k (m_k - centre),

    logit_k = const_k + b_k.z - z'P_k z / 2,        score = sum_k softmax_k(logit) (b_k - P_k z).

* ``Features`` (few dimensions): the logits are linear in phi(z) = (z_i, z_i z_j, 1), so one product W phi gives
  them all, and one more, V exp(logit - max), gives sum b_k e_k, sum P_k e_k and sum e_k. Points run along the
  contiguous axis. Isotropic components need only phi = (z, |z|^2, 1), in any dimension.
* ``Rows`` (many dimensions): one product z [P_1 ... P_K] a chunk of points; members that share covariances (tilts
  by linear rewards) share it.
* ``Eigen`` (fewer points than dimensions): two products with the eigenvectors, which do not depend on time, instead of
  forming P_k, which costs K d^3 at each new time.

Coefficients are computed in float64 for several times at once and then cast. Coordinates are centred, since
uncentred float32 loses everything at an offset of 1000. Chunks are sized to stay in the cache.

Source: measured against each other and against the broadcast form; see benchmarks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Coefficients = tuple[Tensor, ...]
# Vectorised exp leaves its fast path below about -87, and subnormal numbers are slow to multiply.
LOWEST_GAP = -80.0


@dataclass(frozen=True)
class Parameters:
    """M mixtures of K components in d dimensions, float64; shorter mixtures are padded with weight zero.

    Attributes:
        log_weights: (M, K).
        means: less the common centre, (M, K, d).
        eigenvalues: of the covariances, (M, K, d).
        eigenvectors: (M, K, d, d).
        shared: index of the first member with the same covariances, one a member.
    """

    log_weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    shared: tuple[int, ...]

    def members(self, active: Sequence[int]) -> Parameters:
        """Return the mixtures ``active``."""
        index = list(active)
        first = [self.shared[k] for k in index]
        return replace(
            self,
            log_weights=self.log_weights[index],
            means=self.means[index],
            eigenvalues=self.eigenvalues[index],
            eigenvectors=self.eigenvectors[index],
            shared=tuple(first.index(k) for k in first),
        )


class Kernel(Protocol):
    """How to get coefficients from parameters, and scores from coefficients."""

    def coefficients(self, mixtures: Parameters, alpha: Tensor, variance: Tensor, offset: Tensor) -> Coefficients:
        """Return float64 tensors (T, ...) for T times.

        Args:
            mixtures: M mixtures.
            alpha: alpha(t), (T,).
            variance: sigma(t)^2, (T,).
            offset: what is to be added to alpha times the means to make them relative to the centre, (T, d).
        """

    def scores(self, x: Tensor, centre: Tensor, coefficients: Coefficients, shared: tuple[int, ...]) -> Tensor:
        """Return scores (M, B, d) of x (B, d) with the coefficients of one time, in the dtype of x."""


def _noised(mixtures: Parameters, alpha: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return log constants (T, M, K) (without the mean's quadratic) and noised eigenvalues (T, M, K, d)."""
    values = alpha.square().view(-1, 1, 1, 1) * mixtures.eigenvalues + variance.view(-1, 1, 1, 1)
    return mixtures.log_weights - values.log().sum(-1) / 2, values


class Features:
    """The kernel for few dimensions, or for isotropic components.

    Args:
        isotropic: whether all covariances are multiples of the identity.
    """

    def __init__(self, isotropic: bool) -> None:
        self.isotropic = isotropic

    def coefficients(self, mixtures: Parameters, alpha: Tensor, variance: Tensor, offset: Tensor) -> Coefficients:
        """Return W (T, M K, F) and V (T, M, R, K)."""
        constants, values = _noised(mixtures, alpha, variance)
        means = alpha.view(-1, 1, 1, 1) * mixtures.means + offset[:, None, None]
        dim = means.shape[-1]
        if self.isotropic:
            precision = 1 / values[..., :1]
            pull = precision * means
            quadratic, slopes = -precision / 2, -precision
        else:
            vectors = mixtures.eigenvectors
            matrix = (vectors / values.unsqueeze(-2)) @ vectors.mT
            pull = (matrix @ means.unsqueeze(-1)).squeeze(-1)
            # Row i of shift s pairs z_i with z_(i + s): these views need no copy of z in the evaluation.
            index = torch.arange(dim)
            shifted = [matrix[..., index, (index + s) % dim] for s in range(dim)]
            products = [-shifted[0] / 2] + [-shifted[s][..., :n] for s, n in _pairs(dim)]
            quadratic = torch.cat([torch.zeros_like(pull[..., 1:]), *products], -1)
            slopes = -torch.cat(shifted, -1)
        constants = constants - (pull * means).sum(-1) / 2
        w = torch.cat([pull, quadratic, constants.unsqueeze(-1)], -1)
        # Only differences of logits count: relative to the widest component they cancel least in float32.
        real = mixtures.log_weights.isfinite()
        width = (1 / values).sum(-1).masked_fill(~real, torch.inf)
        widest = width.argmin(-1)[..., None, None].expand(*w.shape[:2], 1, w.shape[-1])
        w = w - w.gather(-2, widest)
        v = torch.cat([pull, slopes, torch.ones_like(pull[..., :1])], -1)
        return w.flatten(1, 2), v.mT.contiguous()

    def scores(self, x: Tensor, centre: Tensor, coefficients: Coefficients, shared: tuple[int, ...]) -> Tensor:
        w, v = coefficients
        members, rows, components = v.shape
        batch, dim = x.shape
        xt, centre = x.T, centre.unsqueeze(1)
        out = torch.empty(members, dim, batch, dtype=x.dtype, device=x.device)
        # At most 1 MiB each of features, logits and sums at a time.
        chunk = max(1024, min(32768, (1 << 18) // max(members * components, members * rows, w.shape[1])))
        for start in range(0, batch, chunk):
            n = min(chunk, batch - start)
            space = _workspace((self.isotropic, members, components, dim, n, x.dtype, x.device))
            whole = n == batch
            torch.sub(xt if whole else xt[:, start : start + n], centre, out=space.z)
            space.fill()
            torch.mm(w, space.phi, out=space.flat_logits)
            gaps = space.logits.sub_(torch.amax(space.logits, 1, keepdim=True)).clamp_(min=LOWEST_GAP).exp_()
            torch.bmm(v, gaps, out=space.sums)
            score = space.score
            for slope, z in space.terms:
                score.addcmul_(slope, z)
            torch.div(score, space.total, out=out if whole else out[..., start : start + n])
        return out.mT


class _Workspace:
    """Buffers of one chunk and the views of them that the evaluation needs; slicing anew costs as much as computing."""

    def __init__(
        self,
        isotropic: bool,
        members: int,
        components: int,
        dim: int,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        pairs = [(0, dim), *_pairs(dim)]
        features = dim + 2 if isotropic else 2 * dim + sum(count for _, count in pairs)
        self.phi = empty(features, n)
        self.phi[-1] = 1
        self.z = self.phi[:dim]
        self.isotropic, self.square, self.norm = isotropic, empty(dim, n), self.phi[dim]
        self.again = (self.phi[dim : 2 * dim - 1], self.z[:-1])
        self.products = []
        place = 2 * dim - 1
        for s, count in [] if isotropic else pairs:
            self.products.append((self.z[:count], self.phi[s : s + count], self.phi[place : place + count]))
            place += count
        self.flat_logits = empty(members * components, n)
        self.logits = self.flat_logits.view(members, components, n)
        self.sums = empty(members, dim + 2 if isotropic else dim * (dim + 1) + 1, n)
        self.score, self.total = self.sums[:, :dim], self.sums[:, -1:]
        shifts = [(self.sums[:, dim * (s + 1) : dim * (s + 2)], self.phi[s : s + dim]) for s in range(dim)]
        self.terms = [(self.sums[:, dim : dim + 1], self.z)] if isotropic else shifts

    def fill(self) -> None:
        """Complete the features, given z."""
        if self.isotropic:
            torch.sum(torch.mul(self.z, self.z, out=self.square), 0, out=self.norm)
            return
        target, source = self.again
        if len(target):
            target.copy_(source)
        for first, second, product in self.products:
            torch.mul(first, second, out=product)


_local = threading.local()


def _workspace(key: tuple) -> _Workspace:
    """Return this thread's buffers of a shape; the few shapes used last are kept."""
    kept: dict[tuple, _Workspace] = _local.__dict__.setdefault("kept", {})
    space = kept.get(key)
    if space is None:
        space = _Workspace(*key)
        if len(kept) >= 8:
            kept.pop(next(iter(kept)))
        kept[key] = space
    return space


def _pairs(dim: int) -> list[tuple[int, int]]:
    """Return (s, count): the products z_i z_(i + s mod d), i < count, that with s = 0 make every pair once."""
    return [(s, dim // 2 if 2 * s == dim else dim) for s in range(1, dim // 2 + 1)]


class Rows:
    """The kernel for many dimensions: precisions formed at each time."""

    def coefficients(self, mixtures: Parameters, alpha: Tensor, variance: Tensor, offset: Tensor) -> Coefficients:
        """Return constants (T, M, K), b (T, M, K, d) and precisions side by side (T, G, d, K d), G distinct ones."""
        constants, values = _noised(mixtures, alpha, variance)
        groups = sorted(set(mixtures.shared))
        vectors = mixtures.eigenvectors[groups]
        matrix = (vectors / values[:, groups].unsqueeze(-2)) @ vectors.mT
        means = alpha.view(-1, 1, 1, 1) * mixtures.means + offset[:, None, None]
        place = [groups.index(k) for k in mixtures.shared]
        pull = (matrix[:, place] @ means.unsqueeze(-1)).squeeze(-1)
        return constants - (pull * means).sum(-1) / 2, pull, matrix.movedim(2, 3).flatten(3)

    def scores(self, x: Tensor, centre: Tensor, coefficients: Coefficients, shared: tuple[int, ...]) -> Tensor:
        constants, pulls, matrices = coefficients
        members, components, dim = pulls.shape
        batch = x.shape[0]
        out = torch.empty(members, batch, dim, dtype=x.dtype, device=x.device)
        groups = [[m for m, k in enumerate(shared) if k == first] for first in sorted(set(shared))]
        chunk = max(16, min(1024, (1 << 19) // (components * dim)))
        z_buffer = x.new_empty(chunk, dim)
        product = x.new_empty(chunk, components * dim)
        scratch = x.new_empty(chunk, components, dim)
        for start in range(0, batch, chunk):
            n = min(chunk, batch - start)
            z = torch.sub(x[start : start + n], centre, out=z_buffer[:n])
            for group, matrix in zip(groups, matrices, strict=True):
                y = torch.mm(z, matrix, out=product[:n]).view(n, components, dim)
                squares = torch.mul(y, z.unsqueeze(1), out=scratch[:n]).sum(-1)
                b = pulls[group]
                logits = torch.baddbmm(constants[group].unsqueeze(1), z.expand(len(group), n, dim), b.mT)
                shares = logits.sub_(squares, alpha=0.5).softmax(-1)
                mean_pull = torch.bmm(shares, b)
                mean_push = torch.bmm(shares.transpose(0, 1), y).transpose(0, 1)
                for place, m in enumerate(group):
                    torch.sub(mean_pull[place], mean_push[place], out=out[m, start : start + n])
        return out


class Eigen:
    """The kernel for fewer points than dimensions: no precision is formed.

    Args:
        mixtures: M mixtures; their eigenvectors do not depend on time and are kept.
    """

    def __init__(self, mixtures: Parameters) -> None:
        self._vectors = {(torch.float64, mixtures.eigenvectors.device): mixtures.eigenvectors}
        self.projected = (mixtures.eigenvectors.mT @ mixtures.means.unsqueeze(-1)).squeeze(-1)

    def coefficients(self, mixtures: Parameters, alpha: Tensor, variance: Tensor, offset: Tensor) -> Coefficients:
        """Return constants (T, M, K), means in the eigenbases and inverse eigenvalues (T, M, K, d)."""
        constants, values = _noised(mixtures, alpha, variance)
        projected_offset = (offset[:, None, None, None] @ mixtures.eigenvectors).squeeze(-2)
        return constants, alpha.view(-1, 1, 1, 1) * self.projected + projected_offset, 1 / values

    def scores(self, x: Tensor, centre: Tensor, coefficients: Coefficients, shared: tuple[int, ...]) -> Tensor:
        constants, means, inverse = coefficients
        members, _, dim = means.shape
        key = (x.dtype, x.device)
        if key not in self._vectors:
            self._vectors[key] = next(iter(self._vectors.values())).to(x)
        z = x - centre
        out = torch.empty(members, len(x), dim, dtype=x.dtype, device=x.device)
        for m in range(members):
            vectors = self._vectors[key][m]
            y = (z @ vectors).sub_(means[m].unsqueeze(1))
            pulls = y * inverse[m].unsqueeze(1)
            logits = (y * pulls).sum(-1).mul_(-0.5).add_(constants[m].unsqueeze(1))
            pulls.mul_(logits.softmax(0).neg_().unsqueeze(-1))
            torch.mm(pulls.transpose(0, 1).flatten(1), vectors.mT.flatten(0, 1), out=out[m])
        return out
