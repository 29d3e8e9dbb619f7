"""The options of ``sdeblend generate``: read off the command line by a model that says what they mean and may be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
from pydantic import Field

from sdeblend import Preference
from sdeblend.shell.settings import Settings, describe
from stablediffusion.blending.engine import Mode
from stablediffusion.small.files import GUIDANCE

BUNDLED = "bundled"


class Options(Settings):
    """What is to be generated, one option a field.

    Attributes:
        model: folder or hub id of a diffusers pipeline; by default the bundled small model
        member: NAME=PATH of a LoRA file, folder or hub id; repeat. The bundled model has members of its own
        weights: NAME=W,... preference weights; the base takes what is left to 1
        strength: 1 as the members were tuned, 0 the base, above 1 beyond
        mode: all members a step, one a step, or a baseline
        correct: certificate only, resampled images, or neither
        prompt: what is to be seen
        negative: negative prompt
        images: a point, from seed, seed + 1, ...
        steps: of the scheduler
        eta: noise of ddim and flow-ancestral; a certificate needs more than 0
        guidance: guidance scale as the pipeline counts it; by default its own, or the bundled model's 1.5
        sampler: auto is ddim, and the scheduler of its own for a flow model; flow-ancestral gives that one noise
        seed: of the first image
        sweep: NAME=FROM:TO:COUNT, one row of images for each weight of a member
        height, width: of the images in pixels; the model's own by default
        dtype: of the networks
        device: cuda, cpu, ...; by default a GPU if there is one
        out: folder for images, sheet.png and run.json; by default one of its own under out/
    """

    model: str = BUNDLED
    member: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, float]
    strength: float = 1.0
    mode: Mode = "mpa"
    correct: Literal["certify", "resample", "none"] = "certify"
    prompt: str
    negative: str = ""
    images: int = Field(4, ge=1)
    steps: int = Field(50, ge=1)
    eta: float = Field(1.0, ge=0, le=1)
    guidance: float | None = None
    sampler: Literal["auto", "ddim", "ddpm", "euler-a", "flow-ancestral", "keep"] = "auto"
    seed: int = Field(0, ge=0, lt=2**62)
    sweep: str | None = None
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str | None = None
    out: Path | None = None

    @property
    def preferences(self) -> list[Preference]:
        """The preference of each point."""
        return [Preference(weights, self.strength) for weights in sweep_points(self.weights, self.sweep)]


def read_options(argv: Sequence[str], prog: str, summary: str) -> Options:
    """Return the options of a command line; what the model has of its own is filled in.

    Args:
        argv: the arguments.
        prog: the command's name, for help.
        summary: its one line, for help.

    Raises:
        ValueError: for options that are not allowed, or do not fit together.
    """
    parser = argparse.ArgumentParser(prog=prog, description=summary)
    for key in describe(Options):
        field = Options.model_fields[key.name]
        table = get_origin(field.annotation) is dict  # NAME=VALUE, as text
        kinds = (str,) if table else get_args(field.annotation) or (field.annotation,)
        more: dict[str, Any] = {"type": next((kind for kind in (int, float) if kind in kinds), str)}
        if isinstance(kinds[0], str):
            more = {"choices": kinds}
        if key.name == "member":
            more["action"] = "append"
        more |= {"required": field.is_required(), "default": argparse.SUPPRESS, "help": key.description}
        names = (f"--{key.name}", *(["--scheduler"] if key.name == "sampler" else []))  # what it was called
        parser.add_argument(*names, **more)
    given = vars(parser.parse_args(list(argv)))
    given["member"] = named(given.get("member", []), "--member")
    weights = named(given["weights"].split(","), "--weights")
    given["weights"] = {name: _number(value) for name, value in weights.items()}
    try:
        options = Options(**given)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    bundled = options.model == BUNDLED
    own = {name: BUNDLED for name in weights if bundled and name not in options.member}
    guidance = GUIDANCE if bundled and options.guidance is None else options.guidance
    options = options.changed(member=options.member | own, guidance=guidance)
    unknown = [name for name in weights if name not in options.member]
    if unknown:
        raise ValueError(
            f"--weights must name members ({', '.join(options.member)}), got {', '.join(unknown)}; add a --member"
        )
    return options


def named(items: Sequence[str], option: str) -> dict[str, str]:
    """Return ``["name=value", ...]`` as a dictionary.

    Raises:
        ValueError: for an item without "=", an empty side or a repeated name.
    """
    out: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value) or name in out:
            raise ValueError(f"{option} must be NAME=VALUE with a new name each time, got {item!r}")
        out[name] = value
    return out


def sweep_points(weights: Mapping[str, float], sweep: str | None) -> list[dict[str, float]]:
    """Return the weights of each point.

    Args:
        weights: where nothing is swept.
        sweep: "name=from:to:count"; the other weights keep their proportions, and the sum of all stays as it was.

    Raises:
        ValueError: for another form, or a name without a weight.
    """
    if sweep is None:
        return [dict(weights)]
    name, _, span = sweep.partition("=")
    try:
        low, high, count = span.split(":")
        values = np.linspace(float(low), float(high), int(count)).tolist()
    except ValueError:
        values = []
    if name not in weights or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"--sweep must be NAME=FROM:TO:COUNT with a name of --weights ({', '.join(weights)}) and COUNT >= 2, "
            f"got {sweep!r}"
        )
    total, rest = sum(weights.values()), sum(w for other, w in weights.items() if other != name)
    return [
        {
            other: value if other == name else (total - value) * (w / rest if rest else 1 / (len(weights) - 1))
            for other, w in weights.items()
        }
        for value in values
    ]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
