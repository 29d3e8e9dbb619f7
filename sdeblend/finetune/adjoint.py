"""Adjoint matching: regress the control on the gradient of the reward, carried back by the base's own steps.

In the process of ``sdeblend.finetune.process`` a step adds M_k to what the base does, which costs |M_k|^2 / (2 G_k^2).
The optimal control is M_k = -G_k^2 E[a_{k+1} | path to x_k] under the optimal process, where the lean adjoint solves

    a_n = -grad r(x_n) / kl_weight,
    a_k = (A_k + B_k S_base')' a_{k+1} + C_{k+1} (p_k + q_k S_base')' a_{k+2}          (S_base' the Jacobian at x_k),

so one draws paths of the tuned process, carries a back by vector-Jacobian products of base scores, holds both fixed,
and minimises sum_k |M_k / G_k + G_k a_{k+1}|^2 / 2. The process is memoryless, without which the end of a path would
know of its start and the optimum would not be the tilt. Exact up to the discretisation.

Source: Domingo-Enrich et al. 2409.08861, algorithm 1 and proposition 7; the second term is that of a multistep method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeblend.finetune.backprop import check_differentiable
from sdeblend.finetune.model import Condition, Tunable, converted, per_row, take
from sdeblend.finetune.process import Paths, draw_paths, plan
from sdeblend.finetune.reward import WeightedReward
from sdeblend.finetune.trainer import Batch, Metrics, Settings, Trainer, Workers


@dataclass(frozen=True)
class AdjointSettings(Settings):
    """What adjoint matching needs besides.

    Attributes:
        share: fraction of each path's steps that are regressed on, spread evenly along it; at least one is.

    Raises:
        ValueError: for a share outside (0, 1].
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie within (0, 1], got {self.share}; 1 regresses on every step")


class AdjointMatching(Trainer):
    """The adjoint matching trainer; arguments as ``Trainer``, with ``AdjointSettings``."""

    name: ClassVar[str] = "adjoint"
    settings: AdjointSettings

    def __init__(
        self, model: Tunable, reward: WeightedReward, settings: AdjointSettings, workers: Workers | None = None
    ) -> None:
        super().__init__(model, reward, settings, workers)
        self.moves = plan(model, self.chain.grid)

    def iterate(self) -> Metrics:
        batch = self.draw()
        with torch.no_grad(), self.workers.autocast():
            paths = draw_paths(self.model, self.moves, batch.noise, batch.condition)
        parts = [
            self.carry_back(paths.states[:, index], take(batch.condition, index))
            for index in torch.arange(batch.noise.shape[1]).split(self.settings.micro_batch)
        ]
        loss, kl = self.fit(paths, torch.cat([adjoints for _, adjoints in parts], 1), batch)
        self.iteration += 1
        return {"reward": self.mean(torch.cat([reward for reward, _ in parts])), "kl": kl, "loss": loss}

    def carry_back(self, states: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """Solve for the lean adjoint along paths.

        Args:
            states: of B paths, (n + 1, B, *event).
            condition: of the B samples.

        Returns:
            rewards (B,) and the adjoint after each noisy step, (n - 1, B, *event).
        """
        end = states[-1].detach().requires_grad_()
        with torch.enable_grad():
            reward = self.score(end, condition)
            check_differentiable(reward)
            (gradient,) = torch.autograd.grad(reward.sum(), end)
        adjoint, beyond = -gradient / self.settings.kl_weight, torch.zeros_like(gradient)
        adjoints: list[Tensor] = []
        for k in reversed(range(len(self.moves))):
            move, c = self.moves[k], self.moves[k + 1].c if k + 1 < len(self.moves) else 0.0
            if move.g:
                adjoints.append(adjoint)
            x = states[k].detach().requires_grad_()
            times = move.t.expand(len(x))
            with torch.enable_grad(), self.workers.autocast():
                score = converted(self.model, self.model.base(x, times, condition).to(x.dtype), x, times, "score")
            pull = move.b * adjoint + c * move.q * beyond
            (turned,) = torch.autograd.grad(score, x, pull)
            adjoint, beyond = move.a * adjoint + c * move.p * beyond + turned, adjoint
        return reward.detach(), torch.stack(adjoints[::-1])

    def fit(self, paths: Paths, adjoints: Tensor, batch: Batch) -> tuple[float, float]:
        """Take one gradient step of the regression; return the loss and the mean KL of the paths, nats."""
        noisy, rows = adjoints.shape[:2]
        count = max(1, round(self.settings.share * noisy))
        total = self.settings.total
        draw = torch.rand((count, total), generator=self.generator, dtype=torch.float64)[:, batch.rows]
        steps = ((torch.arange(count)[:, None] + draw) / count * noisy).long().flatten()
        owner = torch.arange(rows).repeat(count)
        costs = torch.zeros(len(steps))
        t, b, c, g = (torch.tensor([float(getattr(m, name)) for m in self.moves], dtype=torch.float64)
                      for name in "tbcg")  # fmt: skip

        def loss_of(index: Tensor) -> Tensor:
            k, i = steps[index], owner[index]
            x = paths.states[k, i]
            with self.workers.autocast():
                out = self.model.tuned(x, t[k], take(batch.condition, i)).to(x.dtype)
            shift = converted(self.model, out, x, t[k], "score") - paths.base[k, i]
            scaled = per_row(b[k] / g[k], x) * shift + per_row(c[k] / g[k], x) * paths.old_shift[k, i]
            costs[index] = scaled.detach().square().flatten(1).sum(1).cpu().float() / 2
            return (scaled + per_row(g[k], x) * adjoints[k, i]).square().flatten(1).sum(1) / 2

        # The sum over the steps of a path, estimated from those that were drawn.
        loss = self.descend(len(steps), loss_of, total=total * count) * noisy
        return loss, self.mean(costs) * noisy
