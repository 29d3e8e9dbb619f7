"""One denoiser call as a ``ScoreStack``: base and members on the same arguments, one evaluation each.

A pipeline calls its denoiser with R = G B rows, B images in each of G guidance branches (negative prompts
first). Here an image is one sample whose event has the branch in front: x is (B, G, *event), so that the
core's coefficients and selections are per image, whatever the guidance. Predictions stay what the network
predicts (eps, v, x0, velocity): coefficients sum to one, so blending them is blending scores, before guidance
as well as after it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.score import ScoreStack
from stablediffusion.adapters.members import Member, Members
from stablediffusion.adapters.switch import SideBySide

# Arguments of Flux whose first dimension is the sequence, not the batch.
_NOT_BATCHED = ("img_ids", "txt_ids")
_TEXT_ARGUMENTS = ("encoder_hidden_states", "pooled_projections")
_HALF = (torch.float16, torch.bfloat16)

Arguments = dict[str, Any]


class TextEmbeddings:
    """Prompt embeddings of the base and of each member with a text-encoder LoRA.

    A pipeline stacks, repeats and reorders what ``encode_prompt`` returned; each row that reaches the denoiser is
    recognised by its value and exchanged for the member's own.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._known: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def clear(self) -> None:
        """Forget all prompts."""
        self._pairs, self._known = {}, {}

    def record(self, member: str, base: Any, own: Any) -> None:
        """Remember what ``encode_prompt`` returned without and with the member's adapter."""
        pairs = self._pairs.setdefault(member, [])
        for left, right in zip(base, own, strict=True):
            if isinstance(left, Tensor) and left.ndim >= 2:
                pairs.append((left, right))

    def of(self, member: str, given: Tensor) -> Tensor:
        """Return the member's embeddings for the base's rows ``given``.

        Raises:
            ValueError: for a row that no recorded prompt has.
        """
        known = self._known.setdefault(member, [])
        for seen, mapped in known:
            if seen is given:
                return mapped
        pairs = [(b, o) for b, o in self._pairs.get(member, []) if b.shape[1:] == given.shape[1:]]
        base = torch.cat([b for b, _ in pairs]).to(given) if pairs else given[:0]
        same = (given.unsqueeze(1) == base.unsqueeze(0)).flatten(2).all(-1)
        if not bool(same.any(1).all()):
            raise ValueError(
                f"member {member!r} changes the text encoder and needs prompts as text, got embeddings that "
                "encode_prompt did not make; pass prompt="
            )
        mapped = torch.cat([o for _, o in pairs]).to(given)[same.int().argmax(1)]
        self._known[member] = [*known[-3:], (given, mapped)]
        return mapped


class DenoiserStack(ScoreStack):
    """Base and members of a pipeline's denoiser as one stack; member 0 is the base.

    Args:
        forward: the denoiser's own forward.
        network: the denoiser, for its signature and its class.
        members: what to evaluate beside it; their switch must be borrowed while the stack is called.
        side_by_side: evaluate adapters in one pass with a row each, instead of one after the other.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        network: Any,
        members: Members,
        *,
        side_by_side: bool = False,
    ) -> None:
        self.forward, self.members, self.names = forward, members, members.names
        self.embeddings = TextEmbeddings()
        self._all: list[Member] = [Member("base"), *(members[name] for name in members.names)]
        signature = inspect.signature(type(getattr(network, "_orig_mod", network)).forward)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.sample_name = next(iter(self._signature.parameters))
        self._batch = SideBySide(members.switch) if side_by_side else None
        self.output_class: type | None = None
        self._arguments: Arguments = {}
        self._branches, self._images = 1, 0
        self._index: Tensor | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], branches: int) -> Tensor:
        """Take the arguments of one denoiser call; return its sample as (B, G, *event).

        Args:
            args, kwargs: as the pipeline passed them.
            branches: G, 2 with classifier-free guidance in one batch, else 1.
        """
        self._arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        extra = self._arguments.pop("kwargs", {})
        self._arguments.update(extra)
        self.output_class = None
        sample = self._arguments[self.sample_name]
        if len(sample) % branches:
            raise ValueError(
                f"guidance in one batch needs {branches} rows an image, got {len(sample)} rows; "
                "this pipeline guides in a way that a blend does not know"
            )
        self._branches, self._images, self._index = branches, len(sample) // branches, None
        return sample.reshape(branches, -1, *sample.shape[1:]).transpose(0, 1)

    @property
    def arguments(self) -> Arguments:
        """The arguments of the call, by name."""
        return self._arguments

    def __len__(self) -> int:
        return len(self._all)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        """Return the predictions (K, B, G, *event); half precision comes back as float32."""
        chosen = [self._all[k] for k in (range(len(self)) if active is None else active)]
        sample = x.transpose(0, 1).flatten(0, 1)
        calls = [self._of(member, sample) for member in chosen]
        outputs = self._batched(chosen, calls) if self._batch is not None else None
        if outputs is None:
            outputs = [self._run(member, call) for member, call in zip(chosen, calls, strict=True)]
        return torch.stack([self._event(out, x) for out in outputs])

    def rows(self, index: Tensor) -> DenoiserStack:
        """Return the stack for the images ``index`` of this call."""
        part = copy.copy(self)
        part._index = index if self._index is None else self._index[index]
        return part

    def sample_of(self, value: Tensor) -> Tensor:
        """Return (B, G, *event) as the rows the pipeline expects."""
        return value.transpose(0, 1).flatten(0, 1)

    def _of(self, member: Member, sample: Tensor) -> Arguments:
        """Return the member's arguments: its prompt, the chosen rows, own copies of lists."""
        arguments = self._arguments
        if member.text_encoders:
            arguments = arguments | {
                name: self.embeddings.of(member.name, arguments[name])
                for name in _TEXT_ARGUMENTS
                if isinstance(arguments.get(name), Tensor)
            }
            added = arguments.get("added_cond_kwargs") or {}
            if "text_embeds" in added:
                own = self.embeddings.of(member.name, added["text_embeds"])
                arguments["added_cond_kwargs"] = added | {"text_embeds": own}
        rows = None
        if self._index is not None:
            offsets = torch.arange(self._branches, device=self._index.device) * self._images
            rows = (offsets[:, None] + self._index).flatten()
        count = self._branches * self._images
        chosen = {
            name: value if name in _NOT_BATCHED else _take(value, rows, count) for name, value in arguments.items()
        }
        chosen[self.sample_name] = sample
        return chosen

    def _run(self, member: Member, call: Arguments) -> Tensor:
        if member.module is not None:
            return self._prediction(member.module(**call))
        self.members.switch.use(*([] if member.adapter is None else [member.adapter]))
        return self._prediction(self.forward(**call))

    def _prediction(self, output: Any) -> Tensor:
        self.output_class = None if isinstance(output, tuple) else type(output)
        return output[0] if isinstance(output, tuple) else output.sample

    def _batched(self, chosen: list[Member], calls: list[Arguments]) -> list[Tensor] | None:
        """Return the predictions of adapters and base from one pass, or None if fewer than two share it."""
        shared = [k for k, member in enumerate(chosen) if member.module is None]
        if self._batch is None or len(shared) < 2:
            return None
        parts = [calls[k] for k in shared]
        rows = len(parts[0][self.sample_name])
        joined = {
            name: value if name in _NOT_BATCHED else _join([part[name] for part in parts], rows)
            for name, value in parts[0].items()
        }
        with self._batch.parts([chosen[k].adapter for k in shared]):
            self.members.switch.use()
            together = self._prediction(self.forward(**joined)).chunk(len(shared))
        found = dict(zip(shared, together, strict=True))
        return [found[k] if k in found else self._run(member, calls[k]) for k, member in enumerate(chosen)]

    def _event(self, prediction: Tensor, x: Tensor) -> Tensor:
        prediction = prediction.float() if prediction.dtype in _HALF else prediction
        return prediction.reshape(self._branches, len(x), *prediction.shape[1:]).transpose(0, 1)


def _take(value: Any, rows: Tensor | None, count: int) -> Any:
    """Return the rows of every batched tensor in ``value``; lists and dictionaries are copied (the UNet pops)."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if rows is not None and value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {key: _take(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(item, rows, count) for item in value)
    return value


def _join(values: list[Any], rows: int) -> Any:
    """Return the arguments of several members behind one another along the batch."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.ndim and len(first) == rows else first
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], rows) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(list(items), rows) for items in zip(*values, strict=True))
    return first
