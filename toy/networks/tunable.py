"""Mixtures as models to be tuned: a pre-trained network with low-rank differences, or the exact score with a residual.

``MixtureTunable`` is what the trainers of ``sdeblend.finetune`` take. Two bases:

* a ``Network`` pre-trained on the mixture, tuned by a low-rank difference: the small image of a LoRA on a UNet;
* the exact eps of the mixture, tuned by a residual network that starts at zero: then nothing but the trainer errs.

``MixtureSettings`` is the backend ``kind = "mixture"`` of ``sdeblend finetune``:

    [model]
    kind = "mixture"
    problem = "ring8"               # of toy.problems; its rewards, or one's own, are chosen by name
    base = "network"                # or "exact"
    network = "ring8.safetensors"   # pre-trained weights; pre-trained and written there if there are none
    rank = 8

Source: Hu et al. 2106.09685.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sdeblend.finetune.model import ModelSettings
from sdeblend.finetune.state import safetensors_bytes
from sdeblend.parametrisation import Parametrisation
from sdeblend.reward import Condition, Reward, find_reward
from sdeblend.schedule import SCHEDULES, NoiseSchedule
from sdeblend.shell.files import write_atomically
from sdeblend.shell.settings import OneOf
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward
from toy.networks.network import (
    Network,
    add_low_rank,
    for_mixture,
    load_network,
    low_rank_layers,
    pretrain,
    save_network,
)
from toy.problems import PROBLEMS


class ExactEps(nn.Module):
    """The eps of a mixture in closed form, at one time a row; differentiable in x.

    Args:
        mixture: the law at t = 0.
        schedule: the forward process.
    """

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return eps = -sigma grad log p_t at x (B, d) and times t (B,) float64, (B, d)."""
        mixture = self.mixture
        alpha, sigma = self.schedule.alpha(t).to(x.device), self.schedule.sigma(t).to(x.device)
        spread = (alpha.square()[:, None, None] * mixture.eigenvalues + sigma.square()[:, None, None]).to(x)
        centred = x[:, None, :] - alpha.to(x)[:, None, None] * mixture.means.to(x)
        if not mixture.isotropic:
            centred = torch.einsum("kij,bki->bkj", mixture.eigenvectors.to(x), centred)
        pull = centred / spread
        log_density = mixture.log_weights.to(x) - (spread.log() + centred * pull).sum(-1) / 2
        pull = log_density.softmax(1).unsqueeze(-1) * pull
        total = pull.sum(1) if mixture.isotropic else torch.einsum("kij,bkj->bi", mixture.eigenvectors.to(x), pull)
        return sigma.to(x)[:, None] * total


class MixtureTunable:
    """A base on a mixture and a trainable difference to it.

    Args:
        mixture: the law that the base models.
        schedule: the forward process.
        network: pre-trained, tuned by low-rank differences (and changed in place to hold them); None for the exact
            eps, tuned by a residual network.
        rank: of the differences.
        width: of the residual network.
        seed: of the trainable part's start, which changes nothing at first.
    """

    prediction: Parametrisation = "eps"
    guidance = 1.0
    graded_batch: int | None = None

    def __init__(
        self,
        mixture: GaussianMixture,
        schedule: NoiseSchedule,
        network: Network | None = None,
        *,
        rank: int = 8,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        self.mixture, self.schedule, self.network = mixture, schedule, network
        self.event: tuple[int, ...] = (mixture.dim,)
        self.device = torch.device("cpu")
        if network is None:
            self.exact = ExactEps(mixture, schedule)
            self.residual = for_mixture(mixture, schedule, seed=seed, width=width)
            self._parts = dict(self.residual.named_parameters())
        else:
            self._parts = add_low_rank(network, rank, torch.Generator().manual_seed(seed))

    def tuned(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return eps with the trainable part, (B, d)."""
        if self.network is None:
            return self.exact(x, t) + self.residual.residual(x, t)
        self._switch(True)
        return self.network(x, t)

    def base(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return eps without it, (B, d)."""
        if self.network is None:
            return self.exact(x, t)
        self._switch(False)
        return self.network(x, t)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return self._parts

    def conditions(self, groups: int, size: int, generator: torch.Generator) -> Condition | None:
        """Return None: a mixture has no prompts."""
        return None

    def decode(self, x: Tensor) -> Tensor:
        """Return x: rewards see the point itself."""
        return x

    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        """Write the trainable part as safetensors; return the file's path, which gets its suffix if it has none."""
        path = path if path.suffix else path.with_suffix(".safetensors")
        write_atomically(path, safetensors_bytes(self._parts, metadata))
        return path

    def load(self, path: Path) -> dict[str, str]:
        """Take the trainable part from a file that ``save`` wrote and return its metadata.

        Raises:
            ValueError: for a file of other names or shapes, or one that names another base; nothing is changed then.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        wanted = {name: tuple(value.shape) for name, value in self._parts.items()}
        given = {name: tuple(value.shape) for name, value in tensors.items()}
        if wanted != given:
            odd = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
            raise ValueError(f"{path} must hold the trainable part of this model, but differs in {odd[0]}; rebuild it")
        base = metadata.get("sdeblend.base")
        if base not in (None, self.identity()):
            raise ValueError(
                f"{path} needs the base it was tuned on, {base}, got {self.identity()}; build the model it was made for"
            )
        with torch.no_grad():
            for name, value in self._parts.items():
                value.copy_(tensors[name])
        return metadata

    def identity(self) -> str:
        """Return a hash of the base: of the mixture, and of the pre-trained network's weights."""
        digest = hashlib.sha256()
        for value in (self.mixture.log_weights, self.mixture.means, self.mixture.covariances):
            digest.update(value.contiguous().numpy().tobytes())
        if self.network is not None:
            for name, value in sorted(self.network.state_dict().items()):
                if name not in self._parts:
                    digest.update(value.contiguous().numpy().tobytes())
        return f"mixture-{digest.hexdigest()[:16]}"

    def _switch(self, active: bool) -> None:
        assert self.network is not None
        for layer in low_rank_layers(self.network):
            layer.active = active


class TunedScore:
    """The score of a tuned model, or of its base: what ``sdeblend.blend`` takes.

    Args:
        model: whose.
        base: without the trainable part.
    """

    def __init__(self, model: MixtureTunable, *, base: bool = False) -> None:
        self.model, self.predict = model, model.base if base else model.tuned

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """Return -eps / sigma at x (B, d) and a 0-dim time, (B, d), in the dtype of x."""
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        with torch.no_grad():
            return (-self.predict(x.float(), times) / float(self.model.schedule.sigma(t))).to(x.dtype)


def reward_of(quadratic: QuadraticReward, name: str = "quadratic") -> Reward:
    """Return a quadratic reward as trainers call it, (samples, condition) -> (B,)."""
    return Reward(name, lambda samples, condition: quadratic(samples))


class MixtureSettings(ModelSettings):
    """The ``[model]`` table of a mixture.

    Attributes:
        problem: of ``toy.problems``; its rewards are those with a name.
        base: a pre-trained network, or the exact eps.
        network: file of pre-trained weights; pre-trained and written there if there are none.
        pretrain_steps: of the network.
        rank: of the low-rank differences.
        width: of the networks' layers.
        schedule: the forward process.
    """

    problem: Annotated[str, OneOf(PROBLEMS)]
    base: Literal["network", "exact"] = "network"
    network: str | None = None
    pretrain_steps: int = Field(default=3000, ge=1)
    rank: int = Field(default=8, ge=1)
    width: int = Field(default=128, ge=1)
    schedule: Annotated[str, OneOf(SCHEDULES)] = "vp-linear"

    def build(
        self, rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
    ) -> tuple[MixtureTunable, dict[str, Reward]]:
        """Build the model and its rewards; see ``ModelSettings``.

        Raises:
            ValueError: for a reward that does not exist, or weights of another network.
        """
        problem, schedule = PROBLEMS[self.problem](), SCHEDULES[self.schedule]()
        known = {name: reward_of(reward, name) for name, reward in problem.rewards.items()}
        try:
            found = {name: find_reward(name, known) for name in rewards}
        except ValueError as error:
            raise ValueError(f"{file}: [rewards] {error}") from error
        network = None
        if self.base == "network":
            network = for_mixture(problem.base, schedule, seed=0, width=self.width)
            if self.network is not None and Path(self.network).exists():
                load_network(network, self.network)
            else:
                pretrain(network, problem.base, steps=self.pretrain_steps)
                if self.network is not None:
                    save_network(network, self.network)
        model = MixtureTunable(problem.base, schedule, network, rank=self.rank, width=self.width, seed=seed)
        return model, found
