"""Generate images from a blend of LoRA members on a Stable Diffusion, SDXL, SD 3 or Flux model.

    sdeblend generate --weights compress=0.3,vivid=0.7 --prompt "a red circle on a blue background"
    sdeblend generate --model FOLDER|ID --member compress=PATH --member vivid=PATH \
        --weights compress=0.3,vivid=0.7 --strength 1.2 --prompt "a red circle" --images 4 --out DIR

Without --model it is the bundled small model, whose own members need no --member (``stablediffusion/small``). DIR
receives the images, a contact sheet (one row a sweep point, one column a seed) and ``run.json`` with everything that
reproduces them. Image i of every point starts from seed + i, so rows compare like with like; with resampling an image
may descend from another one's seed. A rerun with the same settings continues where the last one stopped; with others
it is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from stablediffusion.small.files import GUIDANCE

MODES = ("mpa", "ls", "soup", "soup-factors")
SCHEDULERS = ("ddim", "ddpm", "euler-a", "keep")
DTYPES = ("float32", "float16", "bfloat16")
CORRECTIONS = ("certify", "resample", "none")
BUNDLED = "bundled"


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend generate``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for settings that do not fit together, or a folder that holds another run.
        OSError: for a model or file that cannot be read or written.
    """
    arguments = _parser().parse_args(list(argv))
    settings = vars(arguments) | {"member": named(arguments.member, "--member")}
    weights = {name: number(value, f"--weights {name}") for name, value in named_list(arguments.weights).items()}
    if arguments.model == BUNDLED:
        settings["member"] |= {name: BUNDLED for name in weights if name not in settings["member"]}
    unknown = [name for name in weights if name not in settings["member"]]
    if unknown:
        raise ValueError(
            f"--weights must name members ({', '.join(settings['member'])}), got {', '.join(unknown)}; add a --member"
        )
    if any(size is not None and size < 8 for size in (arguments.height, arguments.width)):
        raise ValueError(f"--height and --width must be at least 8, got {arguments.height} and {arguments.width}")
    if arguments.steps < 1 or arguments.images < 1:
        raise ValueError(f"--steps and --images must be at least 1, got {arguments.steps} and {arguments.images}")
    if arguments.guidance is None:
        settings["guidance"] = GUIDANCE if arguments.model == BUNDLED else 7.5
    for name in ("strength", "eta", "guidance"):
        if not math.isfinite(settings[name]):
            raise ValueError(f"--{name} must be a finite number, got {settings[name]}")
    if not 0 <= arguments.eta <= 1:
        raise ValueError(f"--eta must lie within [0, 1], got {arguments.eta:g}; 1 is the full noise")
    if not 0 <= arguments.seed < 2**62:
        raise ValueError(f"--seed must be a whole number from 0 to 2^62, got {arguments.seed}")
    points = sweep_points(weights, arguments.sweep)
    # Late: help and settings that cannot be used need neither torch nor diffusers.
    from stablediffusion.generate.run import Run

    out: Path = settings.pop("out") or _folder(settings)
    for name in ("sweep", "weights"):
        settings.pop(name)
    Run(settings, points, out).finish()
    print(out / "run.json")
    return 0


def _folder(settings: dict[str, object]) -> Path:
    """Return a folder of its own for these settings, so that a rerun resumes and another run finds it free."""
    text = json.dumps(settings, sort_keys=True, default=str)
    words = "-".join(re.findall(r"[a-z0-9]+", str(settings["prompt"]).lower()))[:60].strip("-")
    return Path("out", f"{words or 'images'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


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


def named_list(text: str) -> dict[str, str]:
    """Return ``"a=0.3,b=0.7"`` as a dictionary."""
    return named(text.split(","), "--weights")


def number(text: str, what: str) -> float:
    """Return a finite number, or raise a ValueError that names the option."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"{what} must be a finite number, got {text!r}")
    return value


def sweep_points(weights: dict[str, float], sweep: str | None) -> list[dict[str, float]]:
    """Return the weights of each point.

    Args:
        weights: where nothing is swept.
        sweep: "name=from:to:count"; the other weights keep their proportions, and the sum of all stays as it was.

    Raises:
        ValueError: for another form, or a name without a weight.
    """
    if sweep is None:
        return [weights]
    name, _, span = sweep.partition("=")
    parts = span.split(":")
    if name not in weights or len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 2:
        raise ValueError(
            f"--sweep must be NAME=FROM:TO:COUNT with a name of --weights ({', '.join(weights)}) and COUNT >= 2, "
            f"got {sweep!r}"
        )
    low, high = (number(part, "--sweep") for part in parts[:2])
    total, rest = sum(weights.values()), sum(w for other, w in weights.items() if other != name)
    points = []
    for k in range(int(parts[2])):
        value = low + (high - low) * k / (int(parts[2]) - 1)
        count = len(weights) - 1
        points.append(
            {
                other: value if other == name else (total - value) * (w / rest if rest else 1 / count)
                for other, w in weights.items()
            }
        )
    return points


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdeblend generate", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default=BUNDLED, help="folder or hub id of a diffusers pipeline; by default the bundled small model")
    add(
        "--member", action="append", default=[], metavar="NAME=PATH",
        help="LoRA file, folder or hub id; repeat. The bundled model has members of its own",
    )  # fmt: skip
    add("--weights", required=True, metavar="NAME=W,...", help="preference weights; the base takes what is left to 1")
    add("--strength", type=float, default=1.0, help="1 as the members were tuned, 0 the base, above 1 beyond")
    add("--mode", choices=MODES, default="mpa", help="all members a step, one a step, or a baseline")
    add("--correct", choices=CORRECTIONS, default="certify", help="certificate only, resampled images, or neither")
    add("--prompt", required=True)
    add("--negative", default="", help="negative prompt")
    add("--images", type=int, default=4, help="images a point, from seed, seed + 1, ...")
    add("--steps", type=int, default=50)
    add("--eta", type=float, default=1.0, help="noise of DDIM; a certificate needs more than 0")
    add("--guidance", type=float, help="guidance scale; 1 is none; by default 7.5, or the bundled model's 1.5")
    add("--scheduler", choices=SCHEDULERS, default="ddim", help="flow models (SD 3, Flux) keep their own")
    add("--seed", type=int, default=0)
    add("--sweep", metavar="NAME=FROM:TO:COUNT", help="one row of images for each weight of a member")
    add("--height", type=int)
    add("--width", type=int)
    add("--dtype", choices=DTYPES, default="float32", help="of the networks")
    add("--device", help="cuda, cpu, ...; by default a GPU if there is one")
    add("--out", type=Path, help="folder for images, sheet.png and run.json; by default one of its own under out/")
    return parser
