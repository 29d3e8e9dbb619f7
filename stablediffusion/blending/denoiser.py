"""The passes of a pipeline through its denoiser, each a stack of the base's and the members' predictions.

A pass is one call of the denoiser, with R = G B rows: B images in each of G guidance branches (negative prompts
first). Here an image is one sample whose event has the branch in front: x is (B, G, *event), so that the
core's coefficients and selections are per image, whatever the guidance. Predictions stay what the network
predicts (eps, v, x0, velocity): coefficients sum to one, so blending them is blending scores, before guidance
as well as after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.score import ScoreStack
from stablediffusion.adapters.members import Member, Members
from stablediffusion.adapters.side_by_side import SideBySide
from stablediffusion.blending.embeddings import TextEmbeddings

# Arguments of Flux whose first dimension is the sequence, not the batch.
_NOT_BATCHED = ("img_ids", "txt_ids")
_TEXT_ARGUMENTS = ("encoder_hidden_states", "pooled_projections")
_TIMES = ("timestep", "timesteps", "t")
_HALF = (torch.float16, torch.bfloat16)

Arguments = dict[str, Any]


class Denoiser:
    """A pipeline's denoiser with the members of a blend on it.

    Args:
        forward: the denoiser's own forward.
        network: the denoiser, for its signature and its class.
        members: what to evaluate beside it; their switch must be borrowed while a pass is evaluated.
        side_by_side: evaluate adapters in one pass with a row each, instead of one after the other.

    Attributes:
        embeddings: of members that change a text encoder.
    """

    def __init__(
        self, forward: Callable[..., Any], network: Any, members: Members, *, side_by_side: bool = False
    ) -> None:
        self.forward, self.switch, self.names = forward, members.switch, members.names
        self.embeddings = TextEmbeddings()
        self.all = (Member("base"), *(members[name] for name in members.names))
        signature = inspect.signature(type(getattr(network, "_orig_mod", network)).forward)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.sample_name = next(iter(self._signature.parameters))
        self._batch = SideBySide(members.switch) if side_by_side else None
        self._output_class: type | None = None

    def bind(self, args: tuple[Any, ...], kwargs: Arguments, branches: int) -> Pass:
        """Return the pass that a call of the denoiser makes.

        Args:
            args, kwargs: as the pipeline passed them.
            branches: G, 2 with classifier-free guidance in one batch, else 1.
        """
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        self._output_class = None
        rows = len(arguments[self.sample_name])
        if rows % branches:
            raise ValueError(
                f"guidance in one batch needs {branches} rows an image, got {rows} rows; "
                "this pipeline guides in a way that a blend does not know"
            )
        return Pass(self, arguments, branches, rows // branches)

    def predict(self, chosen: Sequence[Member], calls: Sequence[Arguments]) -> list[Tensor]:
        """Return what each member predicts for its arguments."""
        shared = [k for k, member in enumerate(chosen) if member.module is None]
        found: dict[int, Tensor] = {}
        if self._batch is not None and len(shared) > 1:
            parts = [calls[k] for k in shared]
            rows = len(parts[0][self.sample_name])
            joined = {
                name: value if name in _NOT_BATCHED else _join([part[name] for part in parts], rows)
                for name, value in parts[0].items()
            }
            with self._batch.parts([chosen[k].adapter for k in shared]):
                self.switch.use()
                found = dict(zip(shared, self._prediction(self.forward(**joined)).chunk(len(shared)), strict=True))
        return [
            found[k] if k in found else self._run(member, call)
            for k, (member, call) in enumerate(zip(chosen, calls, strict=True))
        ]

    def output(self, sample: Tensor) -> Any:
        """Return a sample as the last call of the network gave its own: a tuple, or an object of its class."""
        return (sample,) if self._output_class is None else self._output_class(sample=sample)

    def _run(self, member: Member, call: Arguments) -> Tensor:
        if member.module is not None:
            return self._prediction(member.module(**call))
        self.switch.use(*([] if member.adapter is None else [member.adapter]))
        return self._prediction(self.forward(**call))

    def _prediction(self, output: Any) -> Tensor:
        self._output_class = None if isinstance(output, tuple) else type(output)
        return output[0] if isinstance(output, tuple) else output.sample


class Pass(ScoreStack):
    """The predictions of base (member 0) and members in one pass.

    They are bound to the arguments of one call, its time among them: the t that a stack is called with says nothing.

    Args:
        denoiser: what predicts.
        arguments: of the call, by name.
        branches: G.
        images: B of the call.
        index: which of its images the stack is restricted to, long; None for all.
    """

    def __init__(
        self, denoiser: Denoiser, arguments: Arguments, branches: int, images: int, index: Tensor | None = None
    ) -> None:
        self.denoiser, self.arguments, self.names = denoiser, arguments, denoiser.names
        self._branches, self._images, self._index = branches, images, index

    @property
    def sample(self) -> Tensor:
        """The state of all images of the call, (B, G, *event)."""
        sample = self.arguments[self.denoiser.sample_name]
        return sample.reshape(self._branches, -1, *sample.shape[1:]).transpose(0, 1)

    @property
    def time(self) -> float:
        """The scheduler's time in the call, as the denoiser is given it."""
        given = next((self.arguments[name] for name in _TIMES if self.arguments.get(name) is not None), None)
        if given is None:
            raise ValueError(
                f"a pass through the denoiser needs its time as one of {', '.join(_TIMES)}, got none of them"
            )
        return float(torch.as_tensor(given).flatten()[0])

    def __len__(self) -> int:
        return len(self.denoiser.all)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None, /) -> Tensor:
        """Return the predictions (K, B, G, *event); half precision comes back as float32."""
        chosen = [self.denoiser.all[k] for k in (range(len(self)) if active is None else active)]
        sample = _rows(x)
        outputs = self.denoiser.predict(chosen, [self._of(member, sample) for member in chosen])
        return torch.stack([self._event(out, x) for out in outputs])

    def rows(self, index: Tensor) -> Pass:
        """Return the stack for the images ``index``."""
        index = index if self._index is None else self._index[index]
        return Pass(self.denoiser, self.arguments, self._branches, self._images, index)

    def output(self, value: Tensor) -> Any:
        """Return predictions (B, G, *event) as the pipeline expects them from the denoiser."""
        return self.denoiser.output(_rows(value).to(self.arguments[self.denoiser.sample_name].dtype))

    def _of(self, member: Member, sample: Tensor) -> Arguments:
        """Return the member's arguments: its prompt, the chosen rows, own copies of lists."""
        arguments, embeddings = self.arguments, self.denoiser.embeddings
        if member.text_encoders:
            arguments = arguments | {
                name: embeddings.of(member.name, arguments[name])
                for name in _TEXT_ARGUMENTS
                if isinstance(arguments.get(name), Tensor)
            }
            added = arguments.get("added_cond_kwargs") or {}
            if "text_embeds" in added:
                own = embeddings.of(member.name, added["text_embeds"])
                arguments["added_cond_kwargs"] = added | {"text_embeds": own}
        rows = None
        if self._index is not None:
            offsets = torch.arange(self._branches, device=self._index.device) * self._images
            rows = (offsets[:, None] + self._index).flatten()
        count = self._branches * self._images
        chosen = {
            name: value if name in _NOT_BATCHED else _take(value, rows, count) for name, value in arguments.items()
        }
        chosen[self.denoiser.sample_name] = sample
        return chosen

    def _event(self, prediction: Tensor, x: Tensor) -> Tensor:
        prediction = prediction.float() if prediction.dtype in _HALF else prediction
        return prediction.reshape(self._branches, len(x), *prediction.shape[1:]).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    """Return (B, G, *event) as the rows of the pipeline, (G B, *event)."""
    return x.transpose(0, 1).flatten(0, 1)


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
