"""The passes of a pipeline through its denoisers, each a stack of the base's and the members' predictions.

A pass is one call of a denoiser with R rows. A pipeline guides by rows of one call (negative prompts first), by
several calls a step, or both, and predictions are blended before: coefficients sum to one, so this is the blend of
scores after guidance too. Which rows belong to one image matters only where images have weights or members of their
own: R = G B then, B images in each of G branches, and an image is one sample whose event has the branch in front,
x (B, G, *event). Predictions stay what the network predicts (eps, v, x0, velocity).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.score import ScoreStack
from stablediffusion.adapters.members import Member, Members
from stablediffusion.adapters.side_by_side import SideBySide
from stablediffusion.blending.calls import Call, Output
from stablediffusion.blending.embeddings import TextEmbeddings

_TEXT_ARGUMENTS = ("encoder_hidden_states", "pooled_projections")
# How far predictions of other batches may be apart, relative to their size and by the network's dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Denoiser:
    """A pipeline's denoiser with the members of a blend on it.

    Args:
        forward: the denoiser's own forward.
        network: the denoiser, for its signature and its class.
        members: what to evaluate beside it; their switch must be borrowed while a pass is evaluated.
        side_by_side: evaluate adapters in one pass with a row each, instead of one after the other, where the network
            allows: the first pass of a kind is compared with the one after the other.
        embeddings: of members that change a text encoder; own ones by default.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        network: Any,
        members: Members,
        *,
        side_by_side: bool = False,
        embeddings: TextEmbeddings | None = None,
    ) -> None:
        self.forward, self.switch, self.names = forward, members.switch, members.names
        self.embeddings = TextEmbeddings() if embeddings is None else embeddings
        self.all = (Member("base"), *(members[name] for name in members.names))
        self._signature = type(getattr(network, "_orig_mod", network)).forward
        self._batch = SideBySide(members.switch) if side_by_side else None
        self._network = network
        self._state: tuple[str, ...] = ()
        self._known: dict[tuple[Any, ...], bool] = {}  # which kinds of calls may be joined, or taken in parts
        self._last: Output | None = None

    def begin(self) -> None:
        """Begin a run: a pipeline may have set other attention, which ties rows where the last run's did not."""
        self._state = tuple(type(m.processor).__name__ for m in self._network.modules() if hasattr(m, "processor"))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], images: int | None = None) -> Pass:
        """Return the pass that a call of the denoiser makes.

        Args:
            args, kwargs: as the pipeline passed them.
            images: B; by default each row counts as one.

        Raises:
            ValueError: rows that are no multiple of the images, or a call that cannot be read.
        """
        call = Call.read(self._signature, args, kwargs)
        images = call.rows if images is None else images
        if call.rows % images:
            raise ValueError(
                f"weights or members an image need as many rows for each image, got {call.rows} rows for {images}; "
                "use one preference for all and mode='mpa'"
            )
        return Pass(self, call, images)

    def predict(self, chosen: Sequence[Member], calls: Sequence[Call]) -> list[Tensor]:
        """Return what each member predicts for its call, (R, *event); half precision comes back as float32."""
        shared = [k for k, member in enumerate(chosen) if member.module is None]
        if self._batch is None or len(shared) < 2:
            return [self._run(member, call) for member, call in zip(chosen, calls, strict=True)]
        found = dict(zip(shared, self._together(self._batch, shared, chosen, calls), strict=True))
        return [
            found[k] if k in found else self._run(member, call)
            for k, (member, call) in enumerate(zip(chosen, calls, strict=True))
        ]

    @property
    def last(self) -> Output:
        """What the network gave last, and how to give another prediction in its place."""
        if self._last is None:
            raise RuntimeError("a denoiser has given nothing yet")
        return self._last

    def predict_rows(self, this: Pass, chosen: Sequence[Member], sample: Tensor, rows: Tensor) -> list[Tensor]:
        """Return what each member predicts for some rows of a pass: of a smaller batch where the network allows.

        The first of a kind is compared with the rows of the whole pass, which serve from then on if they differ.

        Args:
            this: the pass.
            chosen: the members.
            sample: the state of the rows (N, *event).
            rows: which ones, long (N,).
        """

        def whole() -> list[Tensor]:
            turns = (rows[:, None] == rows).tril(-1).sum(1)  # a row may be asked for several times, as by candidates
            found, order = [], [(turns == turn).nonzero().flatten() for turn in range(int(turns.max()) + 1)]
            for places in order:
                state = this.call.sample.clone()
                state[rows[places]] = sample[places].to(state.dtype)
                found.append(self.predict(chosen, [this.of(member, state) for member in chosen]))
            back = torch.cat(order).argsort()
            outputs = [[out[rows[places]] for out in turn] for turn, places in zip(found, order, strict=True)]
            return [torch.cat(parts)[back] for parts in zip(*outputs, strict=True)]

        def part() -> list[Tensor]:
            return self.predict(chosen, [this.of(member, sample, rows) for member in chosen])

        key = (self._state, *this.call.kind)
        if key in self._known:
            return part() if self._known[key] else whole()
        expected = whole()
        found, why = _equal(part, expected, _ROUNDING[self.last.dtype])
        self._known[key] = found is not None
        if found is None:
            warnings.warn(
                f"images with members of their own cost a whole batch a member here: a part of it {why}, because this "
                "pipeline ties the rows of a batch together; the images are the same",
                stacklevel=2,
            )
        return expected if found is None else found

    def _together(
        self, batch: SideBySide, shared: Sequence[int], chosen: Sequence[Member], calls: Sequence[Call]
    ) -> list[Tensor]:
        """Return the predictions of the members ``shared`` from one pass, compared once with one after the other."""
        parts, adapters = [calls[k] for k in shared], [chosen[k].adapter for k in shared]
        joined = Call.joined(parts)  # before a network pops from its lists

        def at_once() -> list[Tensor]:
            with batch.parts(adapters):
                # all are active, so that a call's own scale reaches every one
                self.switch.use(*dict.fromkeys(name for name in adapters if name is not None))
                return list(self._prediction(joined.of(self.forward)).chunk(len(parts)))

        key = (len(shared), self._state, *parts[0].kind)
        if self._known.get(key):
            return at_once()
        single = [self._run(chosen[k], calls[k]) for k in shared]
        if key in self._known:
            return single
        found, why = _equal(at_once, single, _ROUNDING[self.last.dtype])
        self._known[key] = found is not None
        if found is not None:
            return found
        warnings.warn(
            f"members run one after the other: side by side in one pass {why}, because this pipeline ties the rows of "
            "a batch together; the images are the same, batched=False is quiet",
            stacklevel=2,
        )
        return single

    def _run(self, member: Member, call: Call) -> Tensor:
        if member.module is not None:
            return self._prediction(call.of(member.module))
        self.switch.use(*([] if member.adapter is None else [member.adapter]))
        return self._prediction(call.of(self.forward))

    def _prediction(self, given: Any) -> Tensor:
        self._last = Output.read(given)
        return self._last.sample


class Pass(ScoreStack):
    """The predictions of base (member 0) and members in one pass.

    They are bound to the arguments of one call, its time among them: the t that a stack is called with says nothing.

    Args:
        denoiser: what predicts.
        call: of the denoiser.
        images: B of the call.
        index: which of its images the stack is restricted to, long; None for all.
    """

    def __init__(self, denoiser: Denoiser, call: Call, images: int, index: Tensor | None = None) -> None:
        self.denoiser, self.call, self.names = denoiser, call, denoiser.names
        self.images, self._branches, self._index = images, call.rows // images, index

    @property
    def sample(self) -> Tensor:
        """The state of all images of the call, (B, G, *event)."""
        return self._event(self.call.sample)

    def __len__(self) -> int:
        return len(self.denoiser.all)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None, /) -> Tensor:
        """Return the predictions (K, B, G, *event); half precision comes back as float32."""
        chosen = [self.denoiser.all[k] for k in (range(len(self)) if active is None else active)]
        sample = x.transpose(0, 1).flatten(0, 1)
        if self._index is None:
            outputs = self.denoiser.predict(chosen, [self.of(member, sample) for member in chosen])
        else:
            offsets = torch.arange(self._branches, device=self._index.device) * self.images
            rows = (offsets[:, None] + self._index).flatten()
            outputs = self.denoiser.predict_rows(self, chosen, sample, rows)
        return torch.stack([self._event(out) for out in outputs])

    def rows(self, index: Tensor) -> Pass:
        """Return the stack for the images ``index``."""
        return Pass(self.denoiser, self.call, self.images, index if self._index is None else self._index[index])

    def output(self, value: Tensor) -> Any:
        """Return predictions (B, G, *event) of the network's dtype as the pipeline expects them from the denoiser."""
        return self.denoiser.last.like(value.transpose(0, 1).flatten(0, 1))

    def of(self, member: Member, sample: Tensor, rows: Tensor | None = None) -> Call:
        """Return the member's call for a state (N, *event): its prompt, the rows asked for, own copies of lists."""
        call, embeddings = self.call, self.denoiser.embeddings
        if member.text_encoders:
            named = call.named | {
                name: embeddings.of(member.name, call.named[name])
                for name in _TEXT_ARGUMENTS
                if isinstance(call.named.get(name), Tensor)
            }
            added = named.get("added_cond_kwargs") or {}
            if "text_embeds" in added:
                own = embeddings.of(member.name, added["text_embeds"])
                named["added_cond_kwargs"] = added | {"text_embeds": own}
            call = Call(call.positional, named, call.state)
        return call.on(sample, rows)

    def _event(self, rows: Tensor) -> Tensor:
        """Return rows (G N, *event) as images (N, G, *event)."""
        return rows.reshape(self._branches, -1, *rows.shape[1:]).transpose(0, 1)


def _equal(
    other: Callable[[], list[Tensor]], expected: Sequence[Tensor], rounding: float
) -> tuple[list[Tensor] | None, str]:
    """Return predictions made in another way if they are equal up to rounding, else None and how they are not."""
    try:
        found = other()
        apart = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True))
    except (RuntimeError, ValueError, IndexError) as error:  # the network refuses another number of rows
        return None, f"ends in {type(error).__name__}"
    return (found if apart <= rounding else None), f"differs by {apart:.1e} relative to the prediction"
