"""A sheet of images from all-compress to all-vivid: DB-MPA over the soup, with rewards and certificates under it.

    python -m stablediffusion.small.demo [--out out/sheet.png] [--images 8] [--steps 25] [--seed 0]

The bundled model, its members ``compress`` and ``vivid``, five preferences, the same prompts and noise in every cell.
Under each cell: the mean JPEG size and colourfulness of its images with standard errors, and for the blend the
certificate, a bound in nats on how far the sampled chain is from its target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sdeblend.blend import Preference
from sdeblend.shell.console import show_table, track
from sdeblend.shell.files import write_atomically
from stablediffusion.adapters.members import load_members
from stablediffusion.blending.engine import Mode
from stablediffusion.small import load_small
from stablediffusion.small.cells import PROMPTS, Cell, draw_cell, mean_and_error
from stablediffusion.small.files import bundled_member

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODES: tuple[Mode, ...] = ("mpa", "soup")
NAMES = {"mpa": "DB-MPA", "soup": "rewarded soup", "ls": "DB-MPA-LS", "soup-factors": "soup of factors"}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the sheet; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/sheet.png"))
    parser.add_argument("--images", type=int, default=8, help="images a cell, a multiple of the number of prompts")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.images < len(PROMPTS) or arguments.images % len(PROMPTS):
        parser.error(f"--images must be a multiple of {len(PROMPTS)}, got {arguments.images}; one or more a prompt")
    each = arguments.images // len(PROMPTS)
    cells = draw_cells(each, arguments.steps, arguments.seed)
    write_atomically(arguments.out, sheet(cells, each))
    write_atomically(arguments.out.with_suffix(".json"), json.dumps([numbers(c) for c in cells], indent=2) + "\n")
    show_table(("method", "weights", "JPEG, kB", "colourfulness", "certificate, nats"), rows(cells), left=2)
    print(arguments.out)
    return 0


def draw_cells(each: int, steps: int, seed: int = 0) -> list[Cell]:
    """Draw every cell, method by method, in the order of ``WEIGHTS``.

    Args:
        each: images a prompt.
        steps: DDIM steps.
        seed: image k of a cell starts from seed + k.
    """
    pipe = load_small()
    members = load_members(pipe, {name: bundled_member(name) for name in ("compress", "vivid")})
    settings = [(mode, weight) for mode in MODES for weight in WEIGHTS]
    return [
        draw_cell(
            pipe,
            members,
            Preference({"compress": 1 - weight, "vivid": weight}),
            mode=mode,
            each=each,
            steps=steps,
            seed=seed,
        )
        for mode, weight in track(settings, "sheet", unit="cells")
    ]


def weights_of(cell: Cell) -> dict[str, float]:
    """Return the weights by name."""
    return dict(zip(cell.preference.names or (), cell.preference.coefficients().tolist()[1:], strict=True))


def numbers(cell: Cell) -> dict[str, object]:
    """Return what was measured on a cell, as JSON can hold it."""
    (saved, size_error), (colour, colour_error) = cell.mean("compress"), cell.mean("vivid")
    nats, nats_error = (None, None) if cell.nats is None else mean_and_error(cell.nats)
    return {
        "method": cell.mode,
        "weights": weights_of(cell),
        "images": len(cell.images),
        "jpeg_kb": -saved,
        "jpeg_kb_error": size_error,
        "colourfulness": colour,
        "colourfulness_error": colour_error,
        "certificate_nats": nats,
        "certificate_nats_error": nats_error,
        "evaluations_an_image": cell.evaluations,
    }


def measured(cell: Cell) -> list[str]:
    """Return JPEG's size in kB, colourfulness and the certificate in nats, empty where there is none, as text."""
    (saved, size_error), (colour, colour_error) = cell.mean("compress"), cell.mean("vivid")
    texts = [f"{-saved:.3f} ± {size_error:.3f}", f"{colour:.3f} ± {colour_error:.3f}"]
    return [*texts, "" if cell.nats is None else "{:.2g} ± {:.1g}".format(*mean_and_error(cell.nats))]


def note(cell: Cell) -> str:
    """Return what stands under a cell."""
    size, colour, nats = measured(cell)
    lines = [f"JPEG {size} kB", f"colourfulness {colour}", *([f"certificate {nats} nats"] if nats else [])]
    return "\n".join(lines)


def sheet(cells: Sequence[Cell], each: int) -> bytes:
    """Return the sheet as PNG: a row a method, a column a preference, in a cell a line a prompt of ``each`` images."""
    # late: the numbers need no figure
    from sdeblend.shell.figures import contact_sheet, encoded

    lines = [[c for c in cells if c.mode == mode] for mode in MODES]
    picture = contact_sheet(
        [[c.images for c in line] for line in lines],
        rows=[NAMES[mode] for mode in MODES],
        columns=[f"compress {1 - weight:g}, vivid {weight:g}" for weight in WEIGHTS],
        notes=[[note(c) for c in line] for line in lines],
        title="From compress to vivid, the same noise in every cell; lines: " + "; ".join(PROMPTS),
        across=each,
    )
    return encoded(picture)


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """Return the numbers as rows of a table."""
    weighed = (", ".join(f"{name} {w:g}" for name, w in weights_of(cell).items()) for cell in cells)
    return [[NAMES[cell.mode], weights, *measured(cell)] for cell, weights in zip(cells, weighed, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
