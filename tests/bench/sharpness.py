"""What blur, JPEG and microns per px do to the sharpness of real patches: `python -m tests.bench.sharpness [FOLDER]`.

Cuts two real slides of H&E, `../shared/data/slides` where no folder is named, into patches of 256 px, as they are and
out of focus: blurred by a Gaussian of some px at level 0, before all else. Says of each the median and the tenths of
the sharpness of patches that show tissue, and how well one threshold parts sharp from blurred ones (the area under the
ROC curve). Ends with the seconds that measuring takes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image
from scipy import ndimage, stats

from pipeline.tiling.cutting import encode
from pipeline.tiling.sharpness import sharpness
from pipeline.tiling.tissue import find_tissue

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "slides"
SLIDES = {"CMU-1-Small-Region.svs": 0.499, "TCGA-CR-7395-01A-01-TS1.svs": 0.5}
"""Microns per px; the second states none, and its magnification is not known for sure."""
SIGMAS = (0.0, 0.5, 1.0, 2.0, 4.0)
EDGE = 256

RGB = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def patches(rgb: RGB) -> Iterator[RGB]:
    """Squares of a picture of which at least half is tissue."""
    mask = find_tissue(np.asarray(Image.fromarray(rgb).reduce(8))).mask
    for y in range(0, rgb.shape[0] - EDGE, EDGE):
        for x in range(0, rgb.shape[1] - EDGE, EDGE):
            if mask[y // 8 : (y + EDGE) // 8, x // 8 : (x + EDGE) // 8].mean() >= 0.5:
                yield rgb[y : y + EDGE, x : x + EDGE]


def measured(rgb: RGB, sigma: float, factor: int, quality: int) -> Floats:
    """Sharpness of all patches of a picture, blurred and then made smaller by a factor."""
    if sigma:
        blurred = (ndimage.gaussian_filter(rgb[..., channel].astype(np.float32), sigma) for channel in range(3))
        rgb = np.stack([np.rint(channel).astype(np.uint8) for channel in blurred], axis=2)
    small = np.asarray(Image.fromarray(rgb).reduce(factor)) if factor > 1 else rgb
    return np.array([sharpness(encode(patch, quality), EDGE, EDGE) for patch in patches(small)])


def main(folder: Path) -> None:
    """Print a table of each slide."""
    for name, mpp in SLIDES.items():
        with openslide.OpenSlide(str(folder / name)) as slide:
            rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        print(f"\n{name}, {rgb.shape[1]} x {rgb.shape[0]} px\n")
        print("| um per px | JPEG | sigma, um | patches | tenth | median | nine tenths | area under ROC |")
        print("|---|---|---|---|---|---|---|---|")
        for factor, quality in ((1, 90), (1, 50), (2, 90), (4, 90)):
            sharp = measured(rgb, 0.0, factor, quality)
            for sigma in SIGMAS:
                found = sharp if sigma == 0 else measured(rgb, sigma, factor, quality)
                tenth, median, most = np.quantile(found, [0.1, 0.5, 0.9])
                both = np.concatenate([sharp, found])
                ranks = stats.rankdata(both)[: len(sharp)].sum() - len(sharp) * (len(sharp) + 1) / 2
                area = "" if sigma == 0 else f"{ranks / (len(sharp) * len(found)):.3f}"
                cells = [f"{mpp * factor:g}", str(quality), f"{sigma * mpp:.2g}", str(len(found))]
                cells += [f"{tenth:.3g}", f"{median:.3g}", f"{most:.3g}", area]
                print(f"| {' | '.join(cells)} |")
        jpegs = [encode(patch, 90) for patch in patches(rgb)]
        began = time.process_time()
        for jpeg in jpegs:
            sharpness(jpeg, EDGE, EDGE)
        print(f"\n{1e3 * (time.process_time() - began) / len(jpegs):.2f} ms of CPU time a patch")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
