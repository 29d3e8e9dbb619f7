"""Adjoint matching: regress the control on the gradient of the reward, carried back by the base's own steps.

The tuned process of ``sdeblend.finetune.paths`` is to minimise E[-r(x_n) / kl_weight + sum_k v_k |dS_k|^2 / 2], dS_k
the control as a difference of scores at x_k and v_k its charge. Let f_k be the gradient of all this in x_k at fixed
noise, and P_k = B_k f_{k+1} + C_{k+1} q_k f_{k+2} that in the score of step k, which acts on the step and, through the
posterior mean, on the next. Where dS_k is optimal, v_k dS_k(x) = -E[P_k | x_k = x], and

    f_k = (A_k + B_k S_base')' f_{k+1} + C_{k+1} (p_k + q_k S_base')' f_{k+2} + dS_k' (v_k dS_k + P_k)

(S_base', dS_k' the Jacobians at x_k). The mean of the last bracket vanishes there; without that term f is the lean
adjoint a, with a_n = -grad r(x_n) / kl_weight, which needs derivatives of the base alone. So one draws paths of the
tuned process, carries a back by vector-Jacobian products of base scores, holds both fixed, and minimises

    sum_k |sqrt(v_k) dS_k + P_k / sqrt(v_k)|^2 / 2.

The process is memoryless, without which the end of a path would know of its start and the optimum would not be the
tilt. In steps of finite size the bracket's mean does not quite vanish, since the multistep remembers more than x_k and
its best control is not the tilt's at each point: started at a tilt where two modes part, training comes to rest at a
strength of .96 with 50 steps and .98 with 100, whatever the batch. Where paths part the adjoint has heavy tails too: it
takes larger batches than back-propagation, but the activations of one step at a time.

Source: Domingo-Enrich et al. 2409.08861, algorithm 1 and proposition 7; the second term is that of a multistep method.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sdeblend.finetune.model import Condition, per_row, take
from sdeblend.finetune.paths import MULTISTEP, charges, draw_states, evaluated
from sdeblend.finetune.trainer import Batch, Metrics, Trainer, TrainerSettings


class AdjointSettings(TrainerSettings):
    """What adjoint matching needs besides.

    Attributes:
        share: fraction of each path's steps that are regressed on, spread evenly along it; at least one is. Most of
            the noise is the paths', so that many of them at a small share learn more than a few at 1.
        ema_decay: as every trainer's; the strength of the last parameters wanders by a tenth.
    """

    share: float = Field(default=1.0, gt=0, le=1)
    ema_decay: float = Field(default=0.98, ge=0, lt=1)


class AdjointMatching(Trainer):
    """The adjoint matching trainer; arguments as ``Trainer``."""

    name = "adjoint"
    settings_class = AdjointSettings
    settings: AdjointSettings

    def prepare(self) -> None:
        self.moves = MULTISTEP.plan(self.model.schedule, self.grid)
        self.charges = charges(self.model.schedule, self.grid)

    def iterate(self) -> Metrics:
        batch, parts = self.draw(), []
        for index in torch.arange(batch.noise.shape[1]).split(self.micro_batch):
            condition = take(batch.condition, index)
            with torch.no_grad():
                states = draw_states(self.model, MULTISTEP, self.grid, batch.noise[:, index], condition)
            parts.append((states[:-1], *self.carry_back(states, condition)))
        states, base, pulls = (torch.cat([part[i] for part in parts], 1) for i in (0, 1, 2))
        loss, kl = self.fit(states, base, pulls, batch)
        self.iteration += 1
        return {"reward": self.mean(torch.cat([part[3] for part in parts])), "kl": kl, "loss": loss}

    def carry_back(self, states: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for the lean adjoint along paths.

        Args:
            states: of B paths, (n + 1, B, *event).
            condition: of the B samples.

        Returns:
            the base's scores S_base and the pulls P of the n steps, (n, B, *event) each, and rewards (B,).
        """
        end = states[-1].detach().requires_grad_()
        with torch.enable_grad():
            reward = self.score(end, condition, graded=True)
            (gradient,) = torch.autograd.grad(reward.sum(), end)
        adjoint, beyond = -gradient / self.settings.kl_weight, torch.zeros_like(gradient)
        scores, pulls = [], []
        for k in reversed(range(len(self.moves))):
            move, c = self.moves[k], self.moves[k + 1].c if k + 1 < len(self.moves) else 0.0
            x = states[k].detach().requires_grad_()
            times = move.t.expand(len(x))
            with torch.enable_grad():
                score = evaluated(self.model, self.model.base, x, times, condition)[1]
            pull = move.b * adjoint + c * move.q * beyond
            (turned,) = torch.autograd.grad(score, x, pull)
            scores.append(score.detach())
            pulls.append(pull)
            adjoint, beyond = move.a * adjoint + c * move.p * beyond + turned, adjoint
        return torch.stack(scores[::-1]), torch.stack(pulls[::-1]), reward.detach()

    def fit(self, states: Tensor, base: Tensor, pulls: Tensor, batch: Batch) -> tuple[float, float]:
        """Take one gradient step of the regression; return the loss and the mean KL of the paths, nats."""
        n, rows = pulls.shape[:2]
        count = max(1, round(self.settings.share * n))
        total = self.settings.total
        draw = torch.rand((count, total), generator=self.generator, dtype=torch.float64)[:, batch.rows]
        steps = ((torch.arange(count)[:, None] + draw) / count * n).long().flatten()
        owner = torch.arange(rows).repeat(count)
        costs = torch.zeros(len(steps))
        t, root = self.grid, self.charges.sqrt()

        def loss_of(index: Tensor) -> Tensor:
            k, i = steps[index], owner[index]
            x = states[k, i]
            score = evaluated(self.model, self.model.tuned, x, t[k], take(batch.condition, i))[1]
            scaled = per_row(root[k], x) * (score - base[k, i])
            costs[index] = scaled.detach().square().flatten(1).sum(1).cpu().float() / 2
            return (scaled + pulls[k, i] / per_row(root[k], x)).square().flatten(1).sum(1) / 2

        # The sum over the steps of a path, estimated from those that were drawn.
        loss = self.descend(len(steps), loss_of, total=total * count) * n
        return loss, self.mean(costs) * n
