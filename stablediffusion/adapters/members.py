"""Members of a blend on a pipeline: adapters, whole networks, and the base itself.

    members = load_members(pipe, {"compress": "compress.safetensors", "vivid": "vivid/"})

m LoRA members cost the base and m LoRA files of memory, never m networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field, Json, PositiveFloat, ValidationError
from torch import nn

from stablediffusion.adapters import files
from stablediffusion.adapters.files import LoraFile
from stablediffusion.adapters.loading import files_of, load_lora, remove_adapter
from stablediffusion.adapters.networks import check_network
from stablediffusion.adapters.switch import AdapterSwitch, activity_of, check_unfused, freeze
from stablediffusion.pipelines.components import denoisers_of, lora_components, text_encoders_of
from stablediffusion.pipelines.identity import base_identity, same_base

Source = files.Source | Mapping[str, files.Source] | nn.Module | None


@dataclass(frozen=True)
class Member:
    """One member of a blend.

    Attributes:
        name: as preferences name it.
        adapter: its adapter, None for a whole network.
        module: its own network, None for an adapter.
        text_encoders: which text encoders its adapter changes.
        kl_weight: what it was tuned at, the alpha of exp(r / alpha); None where its file does not say.
        reward: weight of each reward it was tuned for, r = sum of weight times reward; None where unknown.
        guidance: the guidance scale at which it is that tilt; None where unknown.
        scales: what each reward was divided by when it was tuned, one where the file does not say.
    """

    name: str
    adapter: str | None = None
    module: nn.Module | None = None
    text_encoders: tuple[str, ...] = ()
    kl_weight: float | None = None
    reward: Mapping[str, float] | None = None
    guidance: float | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


class _Tuning(BaseModel, allow_inf_nan=False):
    """What a member's file says of its tuning, each value as text."""

    kl_weight: PositiveFloat | None = None
    reward: Json[dict[str, float]] | None = None
    guidance: float | None = None
    scales: Json[dict[str, PositiveFloat]] = Field(default="{}", validate_default=True)


class Members:
    """The members that a pipeline can blend, in order; the base is not among them and always available.

    Args:
        pipe: the pipeline that carries the adapters.
        members: the members.

    Attributes:
        adapters: those of the members that are adapters.
    """

    def __init__(self, pipe: Any, members: Mapping[str, Member]) -> None:
        self.pipe, self._members = pipe, dict(members)
        self.adapters = tuple(m.adapter for m in self._members.values() if m.adapter is not None)
        self.switch = AdapterSwitch(denoisers_of(pipe).values(), self.adapters)
        self.text_switch = AdapterSwitch(text_encoders_of(pipe).values(), self.adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in the order given."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Member:
        if name not in self._members:
            raise ValueError(f"a member must be one of {', '.join(self.names)}, got {name!r}; load it first")
        return self._members[name]

    def chosen(self, names: Sequence[str]) -> Members:
        """Return some of the members, in the order of ``names``; the others stay loaded and inactive."""
        return Members(self.pipe, {name: self[name] for name in names})

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Allow both switches' ``use`` inside; every layer is as before afterwards, whatever happens."""
        with self.switch.borrowed(), self.text_switch.borrowed():
            yield

    @property
    def text_members(self) -> tuple[Member, ...]:
        """The members that change a text encoder and so need prompt embeddings of their own."""
        return tuple(m for m in self._members.values() if m.text_encoders)

    @property
    def adapters_only(self) -> bool:
        """Whether no member is a whole network."""
        return all(m.module is None for m in self._members.values())

    def on(self, pipe: Any) -> Members:
        """Return the members for ``pipe``, which shares the networks they were loaded on, as it is now.

        Raises:
            ValueError: an adapter that is gone, fused adapters or projections, a cache, or a whole network that does
                not answer as the pipeline's own.
        """
        components = lora_components(pipe)
        check_unfused(pipe, components.values())
        loaded = {name for module in components.values() for name in getattr(module, "peft_config", {})}
        for member in self._members.values():
            if member.adapter is not None and member.adapter not in loaded:
                raise ValueError(
                    f"member {member.name!r} needs its adapter in {type(pipe).__name__}, got "
                    f"{', '.join(sorted(loaded)) or 'no adapter'}; call load_members on this pipeline again"
                )
            if member.module is not None:
                check_network(pipe, member.name, member.module, self.adapters)
        return Members(pipe, self._members)

    def remove(self) -> None:
        """Remove the members' adapters from the pipeline."""
        for member in self._members.values():
            if member.adapter is not None:
                remove_adapter(self.pipe, member.adapter)
        self._members = {}


def load_members(pipe: Any, sources: Mapping[str, Source]) -> Members:
    """Load the members of a blend onto a pipeline, checking that each one arrived.

    The pipeline alone still runs as before: no member is active outside a blend.

    Args:
        pipe: a diffusers pipeline.
        sources: name -> LoRA file, folder or hub id; tensors by name; a file for each of some components, by the
            component's name (``{"transformer": high, "transformer_2": low}`` for Wan 2.2, see ``load_lora``); a whole
            network of the denoiser's interface; or None for an adapter of that name which is loaded already.

    Returns:
        the members, in this order.

    Raises:
        ValueError: no member, a name that is taken, "base" or with a "."; an adapter that did not load whole, or whose
            file names another base than this pipeline's; a network that cannot stand in for the denoiser. None is left
            behind then.
    """
    if not sources:
        raise ValueError("a blend needs at least one member, got none; give {'name': 'lora.safetensors'}")
    if "base" in sources:
        raise ValueError("'base' names the pipeline's own network; give the member another name")
    components = lora_components(pipe)
    check_unfused(pipe, components.values())
    restore = activity_of(components.values())
    members: dict[str, Member] = {}
    added: list[str] = []
    denoisers = denoisers_of(pipe)
    # computed for the first member that names its base, once for all
    identity = functools.cache(lambda component: base_identity(denoisers[component]))
    try:
        for name, source in sources.items():
            if isinstance(source, nn.Module):
                check_network(pipe, name, source, [n for n in sources if sources[n] is None])
                members[name] = Member(name, module=source)
                continue
            known: dict[str, Any] = {}
            if source is None:
                where = tuple(c for c, m in components.items() if name in getattr(m, "peft_config", {}))
                if not where:
                    raise ValueError(f"a member without a source must be loaded, got {name!r}; give its LoRA file")
            else:
                given = files_of(source, components)
                for component, file in given:
                    first = component if component in denoisers else next(iter(denoisers))
                    known = _known(name, file, functools.partial(identity, first)) | known
                where = load_lora(pipe, {c: file for c, file in given if c} or given[0][1], name)
                added.append(name)
            encoders = tuple(c for c in where if c.startswith("text"))
            members[name] = Member(name, adapter=name, text_encoders=encoders, **known)
    except BaseException:
        for name in added:
            remove_adapter(pipe, name)
        raise
    finally:
        restore()
        freeze(components.values(), added)
    return Members(pipe, members)


def _known(name: str, file: LoraFile, identity: Callable[[], str]) -> dict[str, Any]:
    """Return what a member's file says of its tuning, after checking that it was tuned on this base."""
    base = file.about.get("base")
    if base is not None and not same_base(base, identity()):
        raise ValueError(
            f"member {name!r} needs the base it was tuned on, {base}, got {identity()}; load the pipeline it was made "
            "for, or tune it on this one"
        )
    try:
        return dict(_Tuning.model_validate({key: file.about[key] for key in _Tuning.model_fields if key in file.about}))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"member {name!r} needs readable sdeblend.* metadata in {file.path}, got {first['input']!r} for "
            f"{first['loc'][0]} ({first['msg']}); tune it again, or remove these entries"
        ) from error
