"""Figures: files that do not change, images that stay themselves."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sdeblend.shell.figures import COLOURS, OKABE_ITO, contact_sheet, curves, encoded, montage, panels


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_figure_is_the_same_file(kind: str, start: bytes) -> None:
    def drawn(value: float) -> bytes:
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([0, value], label="α ± 1")
        return encoded(figure, kind, dpi=50)

    assert drawn(1.0) == drawn(1.0)
    assert drawn(1.0).startswith(start)
    assert drawn(1.0) != drawn(2.0)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="a figure can be png, svg, pdf, got 'gif'; name the file accordingly"):
        encoded(Figure(), "gif")


def test_panels_are_as_many_as_asked_for() -> None:
    figure, axes = panels(4, columns=3, width=2, height=1, beside=1, above=0.5)
    assert len(axes) == len(figure.axes) == 4
    assert figure.get_size_inches().tolist() == [7, 2.5]
    assert len(set(COLOURS)) == 8 and set(COLOURS) < set(OKABE_ITO.values())


def test_curves_keep_targets_apart() -> None:
    lines = {"found": ([0, 1], [1, 2], [0.1, 0.1]), "exact": ([0, 1], [1, 2], None)}
    figure = curves(lines, x="w", y="r", dashed=["exact"])
    found, exact = (container.lines[0] for container in figure.axes[0].containers)
    assert found.get_color() == COLOURS[0] and found.get_linestyle() == "-"
    assert exact.get_color() == "black" and exact.get_linestyle() == "--"


def test_a_montage_goes_row_by_row() -> None:
    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 2, 2)
    picture = montage(images[:5], columns=3)
    assert picture.size == (6, 4)
    assert [picture.getpixel((x, y))[0] for y in (0, 2) for x in (0, 2, 4)] == [0, 51, 102, 153, 204, 255]
    assert montage(images, 3, zoom=2).size == (12, 8)


def image(value: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 200, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def contains(sheet: Image.Image, part: Image.Image) -> bool:
    own = np.asarray(part)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sheet), own.shape)[:, :, 0]
    return bool((windows == own).all((-1, -2, -3)).any())


def test_a_sheet_holds_its_images_and_their_names() -> None:
    cells = [[image(0), image(1)], [image(2), None]]
    sheet = contact_sheet(
        cells, rows=["exact", "mpa"], columns=["w = 0", "w = 1"], notes=[["0.1 ± 0.2", "b"], ["two\nlines", ""]],
        title="a title that is far too long for so few pictures and has to be broken into lines", zoom=1,
    )  # fmt: skip
    assert all(contains(sheet, image(i)) for i in range(3))
    assert not contains(sheet, image(0).rotate(180))
    back = Image.open(io.BytesIO(encoded(sheet)))
    assert np.array_equal(np.asarray(back), np.asarray(sheet))
    # Names at the left and above, a note below; the ink is black on white.
    ink = np.asarray(sheet.convert("L")) < 100
    assert ink[:, :40].any() and ink[:40].any()
    plain = contact_sheet(cells, rows=["", ""], columns=["", ""], zoom=1)
    assert plain.height < sheet.height and plain.width < sheet.width


def test_cells_of_several_images_are_montages() -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sheet = contact_sheet([[images]], rows=["r"], columns=["c"], across=5, zoom=3)
    assert contains(sheet, montage(images, 5, zoom=3))
    assert contains(contact_sheet([[images]], rows=["r"], columns=["c"], zoom=1), montage(images, 3))
    assert contains(contact_sheet([[images]], rows=["r"], columns=["c"]), montage(images, 3, zoom=9))
