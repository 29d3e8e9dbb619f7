"""A value function V(x, t, prompt): what a path from x at time t will earn, as a baseline for policy gradients.

A small perceptron on the flattened state, features of time, and the prompt's words hashed to signs (so that it needs
no text encoder). That is fine for mixtures and small latents; any baseline leaves the gradient's mean alone, and a
poor one costs variance only.

Returns are standardised by mean and deviation of the first batch that is fitted.

Source: Fan et al. 2305.16381 (a value function of state, time and prompt); Weinberger et al. 0902.2206 (hashing).
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sdeblend.finetune.state import load_optimizer, optimizer_state
from sdeblend.finetune.trainers.replay import Replayed
from sdeblend.shell.processes import Processes

WORDS, TIMES, WIDTH = 32, 8, 128


class Value:
    """V(x, t, prompt) and its optimiser.

    Args:
        dimension: of a flattened state.
        rate: learning rate of AdamW.
        seed: of the first weights.
        device: where states live.
    """

    def __init__(self, dimension: int, rate: float, seed: int, device: torch.device) -> None:
        widths = (dimension + 2 * TIMES + WORDS, WIDTH, WIDTH, 1)
        generator = torch.Generator().manual_seed(seed)
        self.layers = [
            (
                (torch.randn(b, a, generator=generator) / math.sqrt(a)).to(device).requires_grad_(),
                torch.zeros(b, device=device, requires_grad=True),
            )
            for a, b in pairwise(widths)
        ]
        with torch.no_grad():
            # V starts as the mean of the returns.
            self.layers[-1][0].zero_()
        self.parameters = [p for layer in self.layers for p in layer]
        # The returns are standardised, so the last bias has no gradient at first but rounding; do not blow it up.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, eps=1e-5)
        self.offset, self.scale = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def _standard(self, x: Tensor, t: Tensor, prompts: tuple[str, ...] | None) -> Tensor:
        """Return the standardised value, (B,) float32, of states (B, *event) at t / t_max (B,)."""
        phase = t[:, None].float() * 2.0 ** torch.arange(TIMES) * (math.pi / 2)
        text = torch.zeros(len(x), WORDS) if prompts is None else torch.tensor([hashed(p) for p in prompts])
        features = torch.cat([phase.sin(), phase.cos(), text.reshape(len(x), WORDS)], 1).to(x.device)
        h = torch.cat([x.flatten(1).float(), features], 1)
        for weight, bias in self.layers[:-1]:
            h = torch.nn.functional.silu(h @ weight.T + bias)
        weight, bias = self.layers[-1]
        return (h @ weight.T + bias).squeeze(1)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, prompts: tuple[str, ...] | None) -> Tensor:
        """Return V, (B,) float64, of states (B, *event) at times t / t_max, (B,), under prompts."""
        return self.offset.to(x.device) + self.scale.to(x.device) * self._standard(x, t, prompts).double()

    def fit(self, drawn: Replayed, t: Tensor, total: int, processes: Processes) -> float:
        """Take one step on the mean square error of these returns, over ``total`` of all processes.

        Returns:
            the loss, in units of the square of the scale.

        Raises:
            FloatingPointError: if it is not finite.
        """
        returns = drawn.returns.double()
        if float(self.scale) == 0:
            moments = torch.stack([returns.sum(), returns.square().sum()]).cpu() / total
            processes.add([moments])
            self.offset = moments[0]
            # Equal returns leave nothing to fit.
            self.scale = (moments[1] - moments[0].square()).clamp_min(0).sqrt().clamp_min(1e-12)
        target = ((returns - self.offset.to(returns)) / self.scale.to(returns)).float()
        loss = (self._standard(drawn.steps.states, t, drawn.prompts) - target).square().sum() / total
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        summed = loss.detach().double().cpu()
        processes.add([*(p.grad for p in self.parameters if p.grad is not None), summed])
        if not math.isfinite(float(summed)):
            raise FloatingPointError(f"the value function must stay finite, got a loss of {float(summed):g}; "
                                     "lower value_rate")
        self.optimizer.step()
        return float(summed)

    def state(self) -> dict[str, Tensor]:
        """Return everything it learned, by name."""
        own = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        return own | optimizer_state(self.optimizer) | {"offset": self.offset, "scale": self.scale}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(state[f"parameter.{i}"])
        load_optimizer(self.optimizer, state)
        self.offset, self.scale = state["offset"].clone(), state["scale"].clone()


@lru_cache(maxsize=4096)
def hashed(prompt: str) -> tuple[float, ...]:
    """Return a prompt's words as a sum of random signs, one pattern a word, of length ``WORDS``."""
    total = [0.0] * WORDS
    for word in prompt.lower().split():
        digest = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=WORDS // 8).digest(), "little")
        total = [value + (1 if digest >> i & 1 else -1) for i, value in enumerate(total)]
    return tuple(value / math.sqrt(max(len(prompt.split()), 1)) for value in total)
