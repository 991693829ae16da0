"""What finding tissue by a network, and measuring sharpness, cost of a slide: `python -m tests.bench.segmentation`.

A slide of 16,384 px square at 0.5 um, made of a real one of H&E (`../shared/data/slides`, or the folder that is named)
laid side by side, tiled JPEG with a pyramid, is tiled by one process on one core: by Otsu's rule, by a U-Net of some
size with random weights at several resolutions, and with its patches' sharpness. CPU seconds of planning (in which the
tissue is found) and of cutting all patches.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from pipeline.config.data import TilingConfig
from pipeline.segmentation.network import open_network
from pipeline.slides.open import open_slide
from pipeline.tiling.slide import tile_slide
from tests.bench.sharpness import FOLDER
from tests.synth import write_pyramid

EDGE = 16_384


class UNet(nn.Module):
    """Ronneberger et al. (2015), four poolings, with batch normalisation and padded convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(_pair(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_pair(3 * narrow, narrow) for narrow in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, 2, 1)
        nn.init.constant_(self.last.weight, 0)  # all is the second class: every place becomes a patch
        self.last.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, h, w)."""
        kept: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(max_pool2d(x, 2) if number else x)
            kept.append(x)
        for block, beside in zip(self.up, reversed(kept[:-1]), strict=True):
            x = block(torch.cat([interpolate(x, scale_factor=2.0), beside], dim=1))
        found: Tensor = self.last(x)
        return found


def _pair(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for entering in (before, after):
        layers += [nn.Conv2d(entering, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def measured(path: Path, **fields: Any) -> tuple[float, float, int]:
    """CPU seconds of planning a slide, and of cutting its patches, which a network has no part in, and how many."""
    spec = TilingConfig.model_validate({"patch_px": 256, "mpp": 0.5, **fields})
    if spec.tissue_model is not None:
        open_network(spec.tissue_model)  # a process loads it once, whatever the number of slides
    with open_slide(path) as reader:
        began = time.process_time()
        tiling = tile_slide(reader, spec, 0.5)
        planned = time.process_time()
        if spec.tissue_model is None:
            deque(tiling.rows(), maxlen=0)
        return planned - began, time.process_time() - planned, len(tiling.cells)


def main(folder: Path) -> None:
    """Print a table."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with openslide.OpenSlide(str(folder / "CMU-1-Small-Region.svs")) as slide:
        one = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    times = -(-EDGE // one.shape[0]), -(-EDGE // one.shape[1]), 1
    with tempfile.TemporaryDirectory() as name:
        path = write_pyramid(Path(name) / "slide.tiff", np.tile(one, times)[:EDGE, :EDGE], tile=240, levels=6)
        network = Path(name) / "unet.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(UNet(16).eval(), torch.zeros(1, 3, 512, 512)).save(str(network))  # type: ignore[no-untyped-call]
        digest = hashlib.sha256(network.read_bytes()).hexdigest()
        known = {"uri": str(network), "sha256": digest, "classes": ["glass", "tissue"], "tissue": ["tissue"]}
        print("| rule | planned, s | cut, s | patches |\n|---|---|---|---|")
        rules: dict[str, dict[str, Any]] = {"otsu": {}, "otsu, sharpness": {"min_sharpness": 0}}
        for mpp in (8.0, 4.0, 2.0):
            rules[f"model at {mpp:g} um"] = {"tissue": "model", "tissue_model": {**known, "mpp": mpp}}
        for rule, fields in rules.items():
            planned, cut, patches = measured(path, **fields)
            print(f"| {rule} | {planned:.2f} | {cut:.2f} | {patches:,} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
