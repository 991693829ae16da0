"""What of real slides counts as tissue, and how much pen with it: `python -m tests.bench.tissue [FOLDER]`.

Reads the overviews in a folder, `../shared/data/tissue` where none is named; on some of them somebody drew with a pen.
Ink is told by colour, one rule for each pen, apart from the rule that is measured: a px that is plainly red, teal, blue
or black. Ends with a table and JSON; exit code 1 when a goal is missed. The rule was made with these pictures, so the
figures say how well it fits them, not how well it does on others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from pipeline.tiling.artefacts import artefact_mask
from pipeline.tiling.tissue import closed, find_tissue

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tissue"
INK_LEFT, TISSUE_LOST = 0.10, 0.02
CLOSING = 16  # px of the overview

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom; px."""
Ring = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Picture:
    """What is on an overview, as a person sees it."""

    inks: tuple[str, ...] = ()
    inside: tuple[Box, ...] = ()
    """Where its slide is: some are screenshots of a window; none: everywhere."""
    sections: tuple[Ring, ...] = ()
    """Its sections by hand, on those without pen, where something else is coloured too; none: everywhere."""
    outline: Ring = ()
    """Around all of a section, its pale parts and its fat, by hand."""


PALE = (
    *((60, 325), (75, 240), (92, 148), (130, 152), (155, 135), (172, 105), (212, 105), (235, 137), (268, 140)),
    *((275, 185), (295, 215), (318, 225), (300, 255), (325, 275), (345, 262), (340, 200), (365, 155), (388, 140)),
    *((440, 150), (480, 110), (515, 105), (540, 130), (535, 200), (553, 200), (565, 260), (560, 320), (525, 350)),
    *((500, 375), (435, 420), (430, 468), (400, 468), (300, 440), (200, 400), (130, 370)),
)
FAT = (
    *((60, 600), (110, 585), (200, 585), (255, 440), (330, 420), (440, 480), (515, 510), (560, 590), (600, 640)),
    *((560, 690), (420, 680), (320, 730), (215, 795), (110, 785), (70, 690)),
)
IHC_LEFT = (
    *((644, 351), (650, 319), (680, 295), (733, 283), (760, 285), (767, 295)),
    *((781, 302), (818, 281), (834, 268), (816, 250), (840, 241), (866, 247)),
    *((891, 276), (893, 319), (877, 367), (829, 399), (787, 409), (760, 420)),
    *((760, 452), (595, 452), (560, 436), (560, 409), (595, 393), (638, 361)),
)
IHC_RIGHT = (
    *((997, 308), (994, 278), (984, 229), (999, 189), (1132, 183), (1155, 202)),
    *((1153, 255), (1171, 276), (1167, 316), (1148, 310), (1100, 303), (1063, 285)),
    *((1052, 287), (1054, 319), (1026, 351), (999, 319)),
)
PICTURES: Mapping[str, Picture] = {
    "dero-21-rgb": Picture(outline=PALE),
    "dero-337-001": Picture(("teal",), inside=((36, 66, 565, 476),)),
    "dero-424-rgb": Picture(),
    "dero-498-rgb": Picture(),
    "dero-combine-pens-background-original": Picture(("teal", "blue"), inside=((32, 56, 568, 444),)),
    "dero-pink-and-purple-slide": Picture(),
    "dero-slide-pen": Picture(("red",)),
    "histoqc-coverslip-ihc": Picture(sections=(IHC_LEFT, IHC_RIGHT)),
    "histoqc-pen-black": Picture(("black",)),
    "histoqc-pen-green": Picture(("teal", "blue"), outline=FAT),
    "tcga-lung-rgb": Picture(),
    "tcga-red-pen": Picture(("red",)),
    "wsi-blue-pen": Picture(("blue",)),
}


@dataclass(frozen=True)
class Line:
    """One overview."""

    name: str
    threshold: float
    above: float
    """Share of the picture above the threshold."""
    tissue: float
    """Share that is tissue."""
    ink: float | None
    """Share of the ink that is tissue; None without ink."""
    ink_above: float | None
    """Share of the ink above the threshold."""
    lost: float | None
    """Share of what is coloured in the sections and called an artefact; None with ink."""
    outlined: tuple[float, float, float] | None
    """Share of the outlined section above the threshold, that is tissue, and that is tissue after closing."""

    @property
    def met(self) -> bool:
        """Whether the goals are reached."""
        return (self.ink is None or self.ink <= INK_LEFT) and (self.lost is None or self.lost <= TISSUE_LOST)


def read(path: Path) -> RGB:
    """A picture on white."""
    image = Image.open(path).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB"))


def ink(rgb: RGB, kind: str) -> Mask:
    """Px that are plainly of a pen's colour."""
    r, g, b = np.moveaxis(rgb.astype(int), 2, 0)
    match kind:
        case "red":
            return np.asarray((r > 150) & (g < 70) & (b < 90))
        case "teal":
            return np.asarray((g - r > 25) & (g > 70))
        case "blue":
            return np.asarray((b - r > 70) & (b - g > 35))
        case _:
            return np.asarray(ndimage.binary_opening(rgb.max(axis=2) < 70))


def measure(path: Path) -> Line:
    """Look at one overview."""
    seen, rgb = PICTURES[path.stem], read(path)
    shape = rgb.shape[:2]
    found = find_tissue(rgb)
    above = find_tissue(rgb, found.threshold).mask
    artefact = artefact_mask(rgb, found.mask)
    mask, drawn = found.mask & ~artefact, _within(shape, seen.inside)
    inked, sections = np.zeros(shape, np.bool_), _drawn(shape, seen.sections) & found.mask
    for kind in seen.inks:
        inked |= ink(rgb, kind) & drawn
    outlined = None
    if seen.outline:
        area = _drawn(shape, [seen.outline])
        outlined = (_share(above, area), _share(mask, area), _share(closed(mask, rgb, CLOSING), area))
    return Line(
        path.stem,
        found.threshold,
        float(above.mean()),
        float(mask.mean()),
        _share(mask, inked) if seen.inks else None,
        _share(above, inked) if seen.inks else None,
        None if seen.inks else _share(artefact, sections),
        outlined,
    )


def _share(mask: Mask, area: Mask) -> float:
    return float(mask[area].mean())


def _drawn(shape: tuple[int, ...], rings: Sequence[Ring]) -> Mask:
    canvas = Image.new("1", (shape[1], shape[0]), color=not rings)
    for ring in rings:
        ImageDraw.Draw(canvas).polygon(list(ring), fill=1)
    return np.asarray(canvas)


def _within(shape: tuple[int, ...], boxes: Sequence[Box]) -> Mask:
    area = np.full(shape, not boxes)
    for left, top, right, bottom in boxes:
        area[top:bottom, left:right] = True
    return area


def _table(lines: Sequence[Line]) -> Iterator[str]:
    heads = ("above", "tissue", "ink left", "of above", "tissue lost", "outline: above, tissue, closed")
    yield f"{'':38} threshold " + " ".join(f"{head:>11}" for head in heads)
    for line in lines:
        shares = (line.above, line.tissue, line.ink, line.ink_above, line.lost)
        cells = " ".join(f"{'' if share is None else f'{share:.2%}':>11}" for share in shares)
        outlined = ", ".join(f"{share:.1%}" for share in line.outlined or ())
        yield f"{line.name:38} {line.threshold:9.0f} {cells} {outlined}"


def main() -> int:
    """Measure all, and tell."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else FOLDER
    lines = [measure(path) for path in sorted(folder.glob("*.png")) if path.stem in PICTURES]
    if not lines:
        print(f"no overviews at {folder}")
        return 2
    print("\n".join(_table(lines)))
    print(json.dumps([asdict(line) for line in lines]))
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
