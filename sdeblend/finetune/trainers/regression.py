"""Regression on one's own samples: no gradient of the reward, no back-propagation through the chain.

Let p be the law of the tuned model, p_base the base's, L = log p / p_base, and A = r / kl_weight - L. For every p and
0 < eta <= 1 the tilt p exp(eta A) / Z is nearer to the optimum; eta = 1 is the optimum p_base exp(r / kl_weight) / Z
itself. Its score is a mean over samples x_0 of p, and so a regression: minimise

    E[ w (x_0) |eps - eps_theta(alpha x_0 + sigma eps, t)|^2 ],        w = exp(eta A) / E[exp(eta A)] - w_min.

So one draws samples, scores them, noises each at several log-SNRs and regresses. eta is the largest step that keeps the
weights even. Subtracting the smallest weight w_min of the group takes off what would teach the model its own samples
unchanged: at the optimum A is constant, nothing is left to learn, and the loss and its noise vanish. More may not be
subtracted: where the weights of the samples behind some x_t are negative on average, the network is driven away from
their mean, and training runs off. E[A] falls short of log E[exp A] by KL(p || optimum), which is logged as "gap".

L is the log ratio of the two processes along the sampled path, which costs one evaluation of the base a step. For two
reversals of one forward process it is the same along every path that ends in x_0. Samples are drawn by the second-order
SDE step, whose transitions given the path so far are Gaussian too, so that this L is exact for it: what the model
learns from its own samples inherits their error, and with the first-order ancestral step modes lose a few per cent of
their width, a quarter of the control near the data at 50 steps, and more where steps are uniform in t.

A sample is noised again by the forward process, which takes the chain to reverse it. With classifier-free guidance it
does not: no forward process has the guided prediction for its score. So guidance is refused.

Copies come in pairs of opposite noise: at high log-SNR, where networks are smooth on the scale of the noise, what the
noise alone would teach cancels.

Without L, and around the base, S_base + Cov(r / kl_weight, grad log q(x_t | x_0) | x_t) has another fixed point: the
tilt's control only to first order in 1 / kl_weight.

Source: Peters and Schaal 2007 and Peng et al. 1910.00177 (reward-weighted regression); beside reinforce adjoint
matching 2605.10759 and iterative tilting 2512.03234.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdeblend.finetune.model import converted, noised, take
from sdeblend.finetune.paths import follow
from sdeblend.finetune.trainer import Batch, Metrics, Trainer, TrainerSettings


class RegressionSettings(TrainerSettings):
    """What the regression trainer needs besides.

    Attributes:
        copies: noised copies of each sample a gradient step.
        epochs: gradient steps an iteration, each on fresh copies.
        effective: least effective share of the samples after one tilt; larger is slower and steadier, 0.5 is usual.
        low, high: log-SNRs between which copies are spread evenly.
        ema_decay: as every trainer's; the average is several times nearer to the tilt than the last parameters.
    """

    copies: Annotated[int, Field(ge=2, multiple_of=2), "an even number of at least 2, as they come in pairs"] = 8
    epochs: int = Field(default=2, ge=1)
    effective: float = Field(default=0.5, gt=0, lt=1)
    low: float = -6.0
    high: float = 6.0
    ema_decay: float = Field(default=0.96, ge=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}; they are log-SNRs")
        return self


class RewardRegression(Trainer):
    """The regression trainer; arguments as ``Trainer``.

    Raises:
        ValueError: for a model with guidance, or log-SNRs that its schedule does not have.
    """

    name = "regression"
    settings_class = RegressionSettings
    settings: RegressionSettings

    def prepare(self) -> None:
        model, settings = self.model, self.settings
        if model.guidance != 1:
            raise ValueError(
                "regression needs a base that predicts the score of its own samples, which takes no guidance, got "
                f"g = {model.guidance:g}, where 1 is none; leave guidance out, or choose another trainer"
            )
        ends = model.schedule.log_snr(self.grid[[0, -2]]).tolist()
        self.range = max(settings.low, ends[0]), min(settings.high, ends[1])
        if not self.range[0] < self.range[1]:
            raise ValueError(
                f"low and high must overlap the schedule's log-SNRs, {ends[0]:.3g} to {ends[1]:.3g}, got "
                f"{settings.low:g} and {settings.high:g}"
            )

    def iterate(self) -> Metrics:
        settings, batch = self.settings, self.draw()
        with torch.no_grad():
            samples, log_ratio, kl = follow(self.model, self.grid, batch.noise, batch.condition)
            rewards = self.score(samples, batch.condition)
        tilt = rewards / settings.kl_weight - log_ratio
        everyone = self.processes.gather(tilt).double().reshape(settings.groups, settings.group_size)
        eta = step_size(everyone, settings.effective)
        weights = excess_weights(eta * everyone).flatten()[batch.rows].to(samples)
        losses = [self.fit(samples, weights, batch) for _ in range(settings.epochs)]
        self.iteration += 1
        gap = everyone.logsumexp(1) - math.log(settings.group_size) - everyone.mean(1)
        return {
            "reward": self.mean(rewards),
            "kl": self.mean(kl),
            "loss": sum(losses) / len(losses),
            "gap": float(gap.mean()),
            "step": eta,
        }

    def copies(self, samples: Tensor, rows: slice, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise each sample at ``count / 2`` log-SNRs, one in each of as many equal parts of the range, both ways.

        Returns:
            states (count * B, *event), their times (count * B,) float64 and their noise, copy by copy: row i belongs to
            sample i mod B.
        """
        total, schedule = self.settings.total, self.model.schedule
        pairs = count // 2
        spread = torch.rand((pairs, total), generator=self.generator, dtype=torch.float64)
        place = (torch.arange(pairs)[:, None] + spread[:, rows]) / pairs
        eps = torch.randn((pairs, total, *self.model.event), generator=self.generator)[:, rows]
        eps = torch.cat([eps, -eps])
        low, high = self.range
        t = schedule.time_of_log_snr(low + (high - low) * place).flatten().repeat(2)
        eps = eps.flatten(0, 1).to(samples)
        return noised(schedule, samples.repeat(count, *[1] * (samples.ndim - 1)), t, eps), t, eps

    def fit(self, samples: Tensor, weights: Tensor, batch: Batch) -> float:
        """Take one gradient step of the weighted regression on fresh copies and return the loss."""
        x, t, eps = self.copies(samples, batch.rows, self.settings.copies)
        rows = torch.arange(len(samples)).repeat(self.settings.copies)

        def loss_of(index: Tensor) -> Tensor:
            out = self.model.tuned(x[index], t[index], take(batch.condition, rows[index])).to(x.dtype)
            predicted = converted(self.model, out, x[index], t[index], "eps")
            return weights[rows[index]] * (eps[index] - predicted).square().flatten(1).mean(1)

        return self.descend(len(x), loss_of, total=self.settings.total * self.settings.copies)


def step_size(tilt: Tensor, effective: float) -> float:
    """Return the largest eta within [0, 1] whose weights exp(eta A) keep their effective size.

    Args:
        tilt: A, float64 (groups, size).
        effective: least mean over the groups of (sum w)^2 / (size sum w^2).
    """

    def share(eta: float) -> float:
        weights = (eta * tilt).softmax(1)
        return float((1 / weights.square().sum(1)).mean()) / tilt.shape[1]

    if share(1.0) >= effective:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= effective else (low, middle)
    return low


def excess_weights(tilt: Tensor) -> Tensor:
    """Return exp(A) over its mean within the group, less the group's smallest, (groups, size)."""
    weights = tilt.softmax(1) * tilt.shape[1]
    return weights - weights.min(1, keepdim=True).values
