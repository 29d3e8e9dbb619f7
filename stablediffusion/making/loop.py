"""One training loop for every network here: AdamW, warm-up, a flat rate, a linear decay, and moving averages.

With progress p in 0..1, by steps or by time, the learning rate is its peak times
min(1, step / warm-up) * min(1, (1 - p) / decay). The state (weights, averages, moments, random generator) goes to
one safetensors file, written whole or not at all, and is read onto the networks' device, whatever device wrote it; on a
CPU a run cut off and resumed by steps equals one never cut off, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sdeblend.shell.console import progress
from sdeblend.shell.files import write_atomically

Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Budget:
    """When a stage ends: after some steps, or after some seconds of training (the other None).

    Raises:
        ValueError: unless one of the two is given, and positive.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [number for number in (self.steps, self.seconds) if number is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ValueError(
                "a stage must last a positive number of steps, or of seconds, "
                f"got {self.steps} steps and {self.seconds} seconds; give one of the two"
            )


@dataclass(frozen=True)
class Rate:
    """Learning rates and averaging.

    Attributes:
        peak: learning rate of each network, by name.
        warm_up: steps.
        decay: last part of the stage in which the rate falls to zero.
        average: decay of the moving average of weights.
    """

    peak: dict[str, float]
    warm_up: int = 150
    decay: float = 0.3
    average: float = 0.999


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed``; networks on the CPU take them from its global generator, restored after."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs' generators, which are not restored
        torch.default_generator.manual_seed(seed)
        yield


class Loop:
    """Train networks on a loss, resumably.

    Args:
        state: file of the stage's state; read if it exists.
        networks: by name, on the device they are to be trained on; their weights change in place.
        rate: learning rates and averaging.
        seed: of the generator handed to the loss, a CPU's on every device.
        save_every: seconds between saves.
        check_every: seconds between checks.
    """

    def __init__(
        self,
        state: Path,
        networks: dict[str, nn.Module],
        rate: Rate,
        seed: int = 0,
        save_every: float = 120.0,
        check_every: float = 300.0,
    ) -> None:
        self.state, self.networks, self.rate = state, networks, rate
        self.save_every, self.check_every = save_every, check_every
        self.generator = torch.Generator().manual_seed(seed)
        groups = [{"params": list(net.parameters()), "peak": rate.peak[k], "lr": 0.0} for k, net in networks.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        self.parameters = {f"{k}.{n}": p for k, net in networks.items() for n, p in net.named_parameters()}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.seconds, self.finished = 0, 0.0, False
        self.log: list[dict[str, float]] = []
        if state.exists():
            self._load()

    def run(self, loss: Loss, budget: Budget, check: Callable[[], dict[str, float]] | None = None,
            every: int = 100) -> None:  # fmt: skip
        """Train until the budget is spent, counting what earlier runs spent.

        Args:
            loss: from a generator to a scalar; draws its own batch.
            budget: of the whole stage.
            check: measured now and then on the averaged weights, for ``log``; its time counts for no budget.
            every: steps between the loss's entries in ``log``.
        """
        if self.finished:
            return
        total, sums = budget.steps, list[Tensor]()
        saved = checked = time.perf_counter()
        start = saved - self.seconds
        with progress(self.state.stem, total or budget.seconds, unit="steps" if total else "s",
                      done=self.step if total else self.seconds) as bar:  # fmt: skip
            while (spent := self._progress(budget)) < 1:
                scale = min(1.0, (self.step + 1) / self.rate.warm_up, (1 - spent) / self.rate.decay)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * scale
                value = loss(self.generator)
                value.backward()
                nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self._average()
                self.step += 1
                before, self.seconds = self.seconds, time.perf_counter() - start
                sums.append(value.detach())
                bar.update(1 if total else self.seconds - before)
                if self.step % every == 0:
                    mean = float(torch.stack(sums).mean())
                    self.log.append({"step": self.step, "seconds": round(self.seconds), "loss": round(mean, 5)})
                    bar.update(0, f"step {self.step}, loss {mean:.4f}")
                    sums.clear()
                if time.perf_counter() - checked > self.check_every:
                    self._check(check)
                    checked = time.perf_counter()
                if time.perf_counter() - saved > self.save_every:
                    self.save()
                    saved = time.perf_counter()
                start = time.perf_counter() - self.seconds
        self._check(check)
        self.finished = True
        self.save()

    def use_averages(self) -> None:
        """Replace the networks' weights by their moving averages, for good; training has ended."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.averages[name])

    def save(self) -> None:
        """Write the state."""
        tensors = {f"weights.{k}": p.detach() for k, p in self.parameters.items()}
        tensors |= {f"averages.{k}": p for k, p in self.averages.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in self.optimizer.state[p].items()}
        tensors["generator"] = self.generator.get_state()
        facts = {"step": self.step, "seconds": self.seconds, "finished": self.finished, "log": self.log}
        contiguous = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
        write_atomically(self.state, save(contiguous, metadata={"facts": json.dumps(facts)}))

    def _progress(self, budget: Budget) -> float:
        return self.step / budget.steps if budget.steps else self.seconds / (budget.seconds or 1e-9)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.rate.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    def _check(self, check: Callable[[], dict[str, float]] | None) -> None:
        if check is None:
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.use_averages()
        self.log.append({"step": self.step, "seconds": round(self.seconds), **check()})
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(kept[name])

    def _load(self) -> None:
        with safe_open(self.state, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            keys = file.keys()
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(file.get_tensor(f"weights.{name}"))
                    self.averages[name] = file.get_tensor(f"averages.{name}").to(p.device)
                    prefix = f"optimizer.{name}."
                    self.optimizer.state[p] = {
                        k.removeprefix(prefix): file.get_tensor(k).to(p.device)
                        for k in keys if k.startswith(prefix) and "." not in k.removeprefix(prefix)
                    }  # fmt: skip
            self.generator.set_state(file.get_tensor("generator"))
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.finished, self.log = facts["finished"], facts["log"]
