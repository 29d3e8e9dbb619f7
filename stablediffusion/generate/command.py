"""Generate images from a blend of LoRA members on a text-to-image model.

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

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from stablediffusion.generate.options import Options, read_options
from stablediffusion.generate.run import Run


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
    options = read_options(argv, "sdeblend generate", (__doc__ or "").partition("\n")[0])
    run = Run(options, options.out or _folder(options))
    run.finish()
    print(run.out / "run.json")
    return 0


def _folder(options: Options) -> Path:
    """Return a folder of its own for these options, so that a rerun resumes and another run finds it free."""
    words = "-".join(re.findall(r"[a-z0-9]+", options.prompt.lower()))[:60].strip("-")
    return Path("out", f"{words or 'images'}-{hashlib.sha256(options.model_dump_json().encode()).hexdigest()[:8]}")
