"""Scores of several Gaussian mixtures in one evaluation: the ``ScoreStack`` that the toy backend samples with.

    S_i(x, t) = grad log p_{i,t}(x),       p_{i,t} = sum_k pi_ik N(a mu_ik, a^2 C_ik + s^2 I).

Which kernel serves (``toy.scores.kernels``) follows from the mixtures and the batch: features for isotropic components
or at most ``FEATURE_DIM`` dimensions, one matrix product otherwise, eigenvectors for fewer points than dimensions.
The state keeps its dtype; coefficients of each time are computed in float64. The plain closed form,
``GaussianMixture.noised(schedule, t).score(x)``, is what this is tested against, and what answers if x requires a
gradient, since the kernels work in place.

Source: Diffusion Blend 2505.18547, Lemma 2 (the members are tilts of one base).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time
from sdeblend.score import Bound, ScoreStack, check_names
from toy.mixtures.mixture import GaussianMixture
from toy.scores.kernels import Coefficients, Eigen, Features, Kernel, Parameters, Rows

FEATURE_DIM = 12
PREPARED_BYTES = 1 << 26
KEPT_TIMES = 8

_Key = tuple[tuple[int, ...], torch.dtype, torch.device]
_Ready = tuple[Kernel, tuple[int, ...], Tensor, Coefficients]


class MixtureStack(ScoreStack):
    """M mixtures as one stack of scores (x (B, d), t) -> (M, B, d).

    Args:
        mixtures: the members, the base first if there is one; coordinates are centred at the mean of the first.
        schedule: the forward process.
        names: of the mixtures after the first, so that a preference can weigh them by name; None if they have none.

    Raises:
        ValueError: no mixture, mixtures of different dimensions, or names that do not fit.
        TypeError: something that is no mixture or no schedule.
    """

    def __init__(
        self, mixtures: Sequence[GaussianMixture], schedule: NoiseSchedule, names: Sequence[str] | None = None
    ) -> None:
        self.mixtures, self.schedule = tuple(mixtures), schedule
        if not self.mixtures:
            raise ValueError("a mixture stack needs at least one mixture, got none")
        for i, mixture in enumerate(self.mixtures):
            if not isinstance(mixture, GaussianMixture):
                raise TypeError(f"a mixture stack needs GaussianMixtures, got {type(mixture).__name__} at {i}")
            if mixture.dim != self.mixtures[0].dim:
                raise ValueError(
                    f"mixtures of a stack must share their dimension, got {self.mixtures[0].dim} and {mixture.dim}"
                )
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"a mixture stack needs a NoiseSchedule, got {type(schedule).__name__}")
        self.names = check_names(names, len(self.mixtures))
        self.dim = self.mixtures[0].dim
        self._isotropic = all(mixture.isotropic for mixture in self.mixtures)
        self._centre = self.mixtures[0].mean
        self._parameters = _parameters(self.mixtures, self._centre, with_vectors=not self._isotropic)
        self._many: Kernel = Features(self._isotropic) if self._isotropic or self.dim <= FEATURE_DIM else Rows()
        self._few: dict[tuple[int, ...], Eigen] = {}
        self._all = tuple(range(len(self.mixtures)))
        self._chosen = {self._all: self._parameters}
        self._grid: Tensor | None = None
        self._prepared: dict[_Key, dict[float, _Ready]] = {}
        self._recent: dict[tuple[float, bool, _Key], _Ready] = {}

    def __len__(self) -> int:
        return len(self.mixtures)

    def prepare(self, times: Tensor | Sequence[float]) -> None:
        """Let the coefficients of these times be computed in one pass, at the first evaluation.

        Optional: it saves time on short evaluations and changes no result. Grids whose coefficients would fill
        more than 64 MiB are left to be computed step by step.

        Args:
            times: the grid of the run to come.
        """
        grid = self.schedule.check_time(torch.as_tensor(times, dtype=torch.float64).detach().flatten().cpu())
        self._grid, self._prepared = None, {}
        one = self._table(self._many, self._parameters, grid[:1], torch.float64, grid.device)
        if isinstance(self._many, Features) and len(grid) * sum(c.nbytes for c in one) <= PREPARED_BYTES:
            self._grid = grid

    def __call__(self, x: Tensor, t: Time, active: Sequence[int] | None = None) -> Tensor:
        """Return the scores of the members ``active`` (default all), (len(active), B, d), in the dtype of x.

        Args:
            x: state (B, d), float32 or float64, in any memory layout; the transpose of a contiguous (d, B)
                is fastest in few dimensions.
            t: time, 0-dim.
            active: positions of the members wanted.

        Raises:
            ValueError: x of another shape, a time outside the schedule, or a member that is not there.
            TypeError: x of another dtype.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"a mixture stack in {self.dim} dimensions needs a state (B, {self.dim}), got {tuple(x.shape)}"
            )
        if x.dtype is not torch.float32 and x.dtype is not torch.float64:
            raise TypeError(f"a state must be float32 or float64, got {x.dtype}; call .float() on it")
        chosen = self._all if active is None else tuple(active)
        if chosen not in self._chosen:
            self._choose(chosen)
        if x.requires_grad and torch.is_grad_enabled():
            members = [self.mixtures[k].noised(self.schedule, t) for k in chosen]
            return torch.stack([member.score(x) for member in members]).to(x.dtype)
        few = isinstance(self._many, Rows) and len(x) < self.dim
        time, key = float(t), (chosen, x.dtype, x.device)
        ready = None if self._grid is None else self._on_grid(key).get(time)
        if ready is None:
            ready = self._recent.get((time, few, key)) or self._at(time, few, key)
        kernel, shared, centre, coefficients = ready
        return kernel.scores(x, centre, coefficients, shared)

    def _choose(self, chosen: tuple[int, ...]) -> None:
        if not chosen or any(isinstance(k, bool) or k not in self._all for k in chosen):
            raise ValueError(
                f"active must name members of the stack, each from 0 to {len(self) - 1}, got {list(chosen)}"
            )
        self._chosen[chosen] = self._parameters.members(chosen)

    def _on_grid(self, key: _Key) -> dict[float, _Ready]:
        """Return what is ready for the times of the prepared grid."""
        if key not in self._prepared and self._grid is not None:
            chosen, dtype, device = key
            parameters = self._chosen[chosen]
            table = self._table(self._many, parameters, self._grid, dtype, device)
            rows = zip(self._grid.tolist(), *(column.unbind() for column in table), strict=True)
            self._prepared[key] = {
                time: (self._many, parameters.shared, centre, tuple(coefficients))
                for time, centre, *coefficients in rows
            }
        return self._prepared[key]

    def _at(self, time: float, few: bool, key: _Key) -> _Ready:
        """Return what is needed at one time, and keep it for the next calls."""
        chosen, dtype, device = key
        parameters = self._chosen[chosen]
        if few and chosen not in self._few:
            self._few[chosen] = Eigen(parameters)
        kernel = self._few[chosen] if few else self._many
        table = self._table(kernel, parameters, torch.tensor([time], dtype=torch.float64), dtype, device)
        centre, *coefficients = (column[0] for column in table)
        if len(self._recent) >= KEPT_TIMES:
            oldest, *_ = self._recent
            self._recent.pop(oldest, None)
        ready = self._recent[time, few, key] = (kernel, parameters.shared, centre, tuple(coefficients))
        return ready

    def _table(
        self, kernel: Kernel, parameters: Parameters, times: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Coefficients:
        times = self.schedule.check_time(times)
        alpha, variance = self.schedule.alpha(times), self.schedule.sigma(times).square()
        # The centre is one that the state's dtype can hold; what rounding took from it goes to the means.
        exact = alpha.unsqueeze(1) * self._centre
        centre = exact.to(dtype)
        values = kernel.coefficients(parameters, alpha, variance, exact - centre)
        return tuple(value.to(device=device, dtype=dtype) for value in (centre, *values))


class MixtureScore(Bound):
    """The score of one mixture as a function (x (B, d), t) -> (B, d), as fast as a stack of one.

    Attributes:
        stack: the stack of one.
    """

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        self.stack = MixtureStack([mixture], schedule)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Return the score at x (B, d) and time t, (B, d)."""
        return self.stack(x, t)[0]

    def prepare(self, times: Tensor) -> None:
        self.stack.prepare(times)


def mixture_score(mixture: GaussianMixture, schedule: NoiseSchedule) -> MixtureScore:
    """Return the score of one mixture as a ``ScoreFunction``.

    Args:
        mixture: p_0.
        schedule: the forward process.
    """
    return MixtureScore(mixture, schedule)


def _parameters(mixtures: Sequence[GaussianMixture], centre: Tensor, *, with_vectors: bool) -> Parameters:
    """Stack the mixtures' parameters, padding with components of weight zero."""
    count = max(mixture.components for mixture in mixtures)
    rows = [
        torch.cat([torch.arange(m.components), torch.zeros(count - m.components, dtype=torch.long)]) for m in mixtures
    ]
    log_weights = torch.full((len(mixtures), count), -torch.inf, dtype=torch.float64)
    for i, mixture in enumerate(mixtures):
        log_weights[i, : mixture.components] = mixture.log_weights
    pairs = list(zip(mixtures, rows, strict=True))
    vectors = torch.stack([m.eigenvectors[r] for m, r in pairs]) if with_vectors else torch.empty(0)
    if not with_vectors:
        vectors = torch.empty(len(mixtures), count, 0, 0, dtype=torch.float64)
    return Parameters(
        log_weights,
        torch.stack([m.means[r] - centre for m, r in pairs]),
        torch.stack([m.eigenvalues[r] for m, r in pairs]),
        vectors,
        tuple(next(j for j, other in enumerate(mixtures) if _same_covariances(other, m)) for m in mixtures),
    )


def _same_covariances(first: GaussianMixture, second: GaussianMixture) -> bool:
    return torch.equal(first.eigenvalues, second.eigenvalues) and torch.equal(first.eigenvectors, second.eigenvectors)
