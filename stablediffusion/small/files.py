"""Where the bundled model lies, and its members; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

SMALL = Path(__file__).parent
MODEL = SMALL / "model"
MEMBERS = SMALL / "members"
# One file, two roles: r_1 + r_2 at twice a KL weight is (r_1 + r_2) / 2 at that KL weight.
ALIASES = {"compress+vivid": "morl-50"}
# Of 1, 1.5, 2 and 3 the one that draws most captions right, with the colourfulness of drawings (MODEL_CARD.md).
GUIDANCE = 1.5


def bundled_names() -> tuple[str, ...]:
    """Return the names of the bundled members, in alphabetical order."""
    files = [path.stem for path in MEMBERS.glob("*.safetensors")]
    return tuple(sorted(files + [alias for alias, name in ALIASES.items() if name in files]))


def bundled_member(name: str) -> Path:
    """Return the LoRA file of a bundled member.

    Raises:
        ValueError: for another name.
    """
    if name not in bundled_names():
        raise ValueError(
            f"the bundled model's members are {', '.join(bundled_names())}, got {name!r}; "
            "choose among them, or give a --model with --member NAME=PATH"
        )
    return MEMBERS / f"{ALIASES.get(name, name)}.safetensors"
