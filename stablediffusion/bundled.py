"""Where the small text-to-image model that comes with the package lies, and its members; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

SMALL = Path(__file__).with_name("small")
MODEL = SMALL / "model"
MEMBERS = SMALL / "members"
GUIDANCE = 3.0


def bundled_names() -> tuple[str, ...]:
    """Return the names of the bundled members, in alphabetical order."""
    return tuple(sorted(path.stem for path in MEMBERS.glob("*.safetensors")))


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
    return MEMBERS / f"{name}.safetensors"
