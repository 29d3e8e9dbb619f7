"""The ``[backend]`` table of ``sdeblend evaluate`` for diffusers pipelines.

[backend]
kind = "pipeline"
prompts = "prompts.txt"
guidances = [1.0, 7.5]
[backend.members]
compress = "compress"
vivid = "vivid"
[[backend.tuned]]
weights = [0.75, 0.25]
member = "morl-25"
[backend.pairs]
"compress+vivid" = "morl-50"
[[backend.sets]]
name = "alpha 0.25"
[backend.sets.members]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Self

from pydantic import Field, model_validator

from sdeblend.methods.interpolation import PAIR
from sdeblend.shell.settings import Settings
from stablediffusion.rewards.registry import Precision, WeightsByName
from stablediffusion.small.files import GUIDANCE

Files = Mapping[str, Annotated[str, "a file, folder, hub id or bundled member"]]


class Tuned(Settings):
    """A member tuned for a preference itself (MORL).

    Attributes:
        weights: of the preference, in the order of the members.
        member: LoRA file, folder, hub id, or a member of the bundled model.
    """

    weights: tuple[float, ...]
    member: Annotated[str, "a file, folder, hub id or bundled member"]


class MemberSet(Settings):
    """Members for the same rewards.

    Attributes:
        members: reward -> LoRA file, folder, hub id, or a member of the bundled model.
        tuned: members tuned for a preference itself.
        pairs: "a+b" -> a member tuned for (r_a + r_b) / 2, for the second order in the weights.
        half: reward -> a member tuned at twice the KL weight, for the quadratic strength.
    """

    members: Files = Field(default_factory=dict)
    tuned: tuple[Tuned, ...] = ()
    pairs: Files = Field(default_factory=dict)
    half: Files = Field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that have members."""
        return tuple(self.members)

    def sources(self) -> Iterator[tuple[str, str]]:
        """Yield (role, source) of every member: "member:name", "tuned:place", "pair:a+b", "half:name"."""
        yield from ((f"member:{name}", source) for name, source in self.members.items())
        yield from ((f"tuned:{place}", entry.member) for place, entry in enumerate(self.tuned))
        yield from ((f"pair:{name}", source) for name, source in self.pairs.items())
        yield from ((f"half:{name}", source) for name, source in self.half.items())

    def check(self, names: Sequence[str], head: str) -> None:
        """Check that the members are for these rewards; ``head`` begins the message."""
        if not names or self.names != tuple(names):
            wanted, given = (", ".join(some) or "none" for some in (names, self.names))
            raise ValueError(f"{head}needs a member for each reward ({wanted}), got {given}; name them")
        _check_names(self.half, names, f"{head}half")
        _check_names(self.pairs, [a + PAIR + b for a, b in combinations(names, 2)], f"{head}pairs")
        if any(len(entry.weights) != len(names) for entry in self.tuned):
            raise ValueError(f"{head}tuned needs a weight for each of {', '.join(names)}; make them fit")


class NamedSet(MemberSet):
    """Members for the same rewards, a variant.

    Attributes:
        name: of its own.
    """

    name: str


class PipelineSettings(MemberSet):
    """The table without ``kind``.

    Attributes:
        path: folder or hub id; the bundled model if left out.
        prompts: a file with one a line, or a list; the bundled model's own captions if left out.
        captions: of those, how many.
        candidates: drawings a caption, to measure against the exact target; 0 for none.
        guidances: a variant each; for the bundled model 1.5, else 7.5, if left out.
        negative: negative prompt.
        steps: of the pipeline's own scheduler grid, DDIM's with this eta; the last ends at 0.
        eta: share of the noise.
        height, width: of the images in pixels; the model's own if left out.
        dtype: of the networks.
        batch: rows through a network at once, guidance branches counted.
        report: rewards to be reported besides the members'.
        scales: reward -> what it is divided by; as its member's file says, else 1, if left out.
        gradients: reward -> a reward that is differentiable, for guidance in its place.
        rewards: where learned rewards have their weights, see ``stablediffusion.rewards.registry``.
        sets: other members for the same rewards, a variant each, in place of all the above.
    """

    path: str = ""
    prompts: str | tuple[str, ...] = ()
    captions: int = Field(16, ge=1)
    candidates: int = Field(512, ge=0)
    guidances: tuple[float, ...] = ()
    negative: str = ""
    steps: int = Field(50, ge=2)
    eta: float = Field(1.0, ge=0, le=1)
    height: int | None = None
    width: int | None = None
    dtype: Precision = "float32"
    batch: int = Field(64, ge=2)
    report: tuple[str, ...] = ()
    scales: Mapping[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    gradients: Mapping[str, Annotated[str, "the name of a reward"]] = Field(default_factory=dict)
    rewards: WeightsByName = Field(default_factory=dict)
    sets: tuple[NamedSet, ...] = ()

    @property
    def by_name(self) -> dict[str, MemberSet]:
        """The sets of members by name; one alone has the name ""."""
        return {one.name: one for one in self.sets} or {"": self}

    @property
    def each_guidance(self) -> tuple[float, ...]:
        """The guidance scales, by default that of the model."""
        return self.guidances or (7.5 if self.path else GUIDANCE,)

    @property
    def first_names(self) -> tuple[str, ...]:
        """The rewards that have members, in every set the same."""
        return next(iter(self.by_name.values())).names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.by_name) < len(self.sets):
            raise ValueError("sets must each have a name of its own, got one twice; rename it")
        for name, one in self.by_name.items():
            one.check(self.first_names, f"set {name!r} " if name else "")
        _check_names(self.scales, (*self.first_names, *self.report), "scales")
        _check_names(self.gradients, self.first_names, "gradients")
        if self.path and not self.prompts:
            raise ValueError("prompts is missing; give a file with one a line, or a list")
        return self


def _check_names(table: Mapping[str, object], known: Sequence[str], head: str) -> None:
    wrong = [name for name in table if name not in known]
    if wrong:
        raise ValueError(f"{head} must be of {', '.join(known) or 'none'}, got {wrong[0]!r}; correct it")
