"""A small network that predicts eps on a mixture: what a pre-trained denoiser is to an image model.

With data of mean m and standard deviation d (over all coordinates), x = alpha x_0 + sigma eps, and c the standard
deviation of x, c^2 = alpha^2 d^2 + sigma^2, the network F gives

    eps(x, t) = sigma (x - alpha m) / c^2 + (alpha d / c) F((x - alpha m) / c, l(t)),

the optimum for N(m, d^2 I) plus a residual of unit scale at every noise level l = log-SNR. F is a perceptron with SiLU
and l as Fourier features. Its linear layers may carry low-rank differences, W x + b + U D x, with U zero at first.

Source: Karras et al. 2206.00364, table 1 (preconditioning); Hu et al. 2106.09685 (low-rank adaptation).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sdeblend.finetune.model import noised, per_row
from sdeblend.schedule import NoiseSchedule
from sdeblend.shell.files import write_atomically
from toy.mixtures.mixture import GaussianMixture

FREQUENCIES = 8
# Log-SNR at which the pre-training loss looks: beyond it a mixture of unit scale is all noise or all signal.
LOG_SNR = (-9.0, 9.0)


class LowRank(nn.Module):
    """A frozen linear layer and a trainable difference of low rank.

    Args:
        linear: the layer.
        rank: of the difference.
        generator: draws D; U starts at zero.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        down = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank).to(linear.weight))
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out + x @ self.down.T @ self.up.T if self.active else out


class Network(nn.Module):
    """eps(x, t) with the preconditioning above.

    Args:
        schedule: the forward process.
        mean: m, (d,).
        scale: d, the data's standard deviation.
        width: of the hidden layers.
        depth: number of hidden layers.
        generator: draws the weights; the last layer starts at zero.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        mean: Tensor,
        scale: float,
        *,
        width: int = 128,
        depth: int = 3,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.schedule, self.scale = schedule, float(scale)
        self.data_mean: Tensor
        self.register_buffer("data_mean", mean.float())
        sizes = [len(mean) + 2 * FREQUENCIES, *[width] * depth, len(mean)]
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(sizes)):
            linear = nn.utils.skip_init(nn.Linear, inner, outer)
            bound = 0.0 if i == depth else math.sqrt(3 / inner)
            with torch.no_grad():
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.zero_()
            layers += [linear, nn.SiLU()] if i < depth else [linear]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return eps at x (B, d) and times t (B,) float64, (B, d)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        centred = x - per_row(alpha, x) * self.data_mean
        scale = sigma / (alpha.square() * self.scale**2 + sigma.square())
        return per_row(scale, x) * centred + self.residual(x, t)

    def residual(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the part of ``forward`` that is learned, (B, d)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        c = (alpha.square() * self.scale**2 + sigma.square()).sqrt()
        centred = x - per_row(alpha, x) * self.data_mean
        phase = self.schedule.log_snr(t)[:, None] / 20 * torch.arange(1, FREQUENCIES + 1) * (math.pi / 2)
        time = torch.cat([phase.sin(), phase.cos()], 1).to(x)
        out = self.layers(torch.cat([centred / per_row(c, x), time], 1))
        return per_row(alpha * self.scale / c, x) * out


def add_low_rank(network: Network, rank: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Freeze a network, give each linear layer a difference of ``rank`` and return what is trainable, by name."""
    network.requires_grad_(False)
    for i, layer in enumerate(network.layers):
        if isinstance(layer, nn.Linear):
            network.layers[i] = LowRank(layer, rank, generator)
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def low_rank_layers(network: Network) -> Iterator[LowRank]:
    """Return the layers that have a difference."""
    return (layer for layer in network.layers if isinstance(layer, LowRank))


def for_mixture(mixture: GaussianMixture, schedule: NoiseSchedule, *, seed: int, width: int = 128) -> Network:
    """Return an untrained network of the scale of ``mixture``."""
    scale = math.sqrt(float(mixture.covariance.diagonal().mean()))
    return Network(schedule, mixture.mean, scale, width=width, generator=torch.Generator().manual_seed(seed))


def pretrain(
    network: Network,
    mixture: GaussianMixture,
    *,
    steps: int = 3000,
    batch: int = 1024,
    learning_rate: float = 1e-2,
    seed: int = 0,
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Train a network by denoising score matching on exact samples of a mixture.

    Args:
        network: in place; left with the average of its parameters over the last fifth of the steps.
        mixture: what is drawn from.
        steps: of Adam, with a learning rate that falls to zero like a cosine.
        batch: samples a step, at log-SNRs spread evenly over ``LOG_SNR``.
        learning_rate: the largest.
        seed: of samples and noise.
        teacher: eps(x, t) to regress on in place of the noise that was drawn, whose conditional mean it is: the same
            optimum in fewer steps.

    Returns:
        the mean loss of the last tenth of the steps, in units of the residual.

    Source: Vincent 2011 (denoising score matching); Song et al. 2011.13456.
    """
    generator, schedule = torch.Generator().manual_seed(seed), network.schedule
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).tolist()
    low, high = max(LOG_SNR[0], ends[0]), min(LOG_SNR[1], ends[1])
    average = torch.optim.swa_utils.AveragedModel(network)
    drawn = mixture.sample(batch * 64, generator=generator, dtype=torch.float32)
    losses = []
    for step in range(steps):
        x0 = drawn[torch.randint(len(drawn), (batch,), generator=generator)]
        place = (torch.arange(batch) + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch
        t = schedule.time_of_log_snr(low + (high - low) * place)
        eps = torch.randn(x0.shape, generator=generator)
        x = noised(schedule, x0, t, eps)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        unit = (alpha.square() * network.scale**2 + sigma.square()).sqrt() / (alpha * network.scale)
        error = per_row(unit.clamp(max=1e3), x) * (network(x, t) - (eps if teacher is None else teacher(x, t)))
        loss = error.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step >= steps - max(1, steps // 5):
            average.update_parameters(network)
        losses.append(float(loss.detach()))
    network.load_state_dict(average.module.state_dict())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def save_network(network: Network, path: str | os.PathLike[str]) -> None:
    """Write the weights of a network without differences as safetensors, whole or not at all."""
    from safetensors.torch import save

    write_atomically(path, save({name: value.contiguous() for name, value in network.state_dict().items()}))


def load_network(network: Network, path: str | os.PathLike[str]) -> None:
    """Take weights that ``save_network`` wrote.

    Raises:
        ValueError: for a file of other names, shapes, or no safetensors file at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        network.load_state_dict(load(Path(path).read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} must hold weights of this network, got another file ({reason}); delete it") from None
