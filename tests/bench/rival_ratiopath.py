"""ratiopath's way from a slide to tiles in a Parquet file, as its documentation shows it; prints tiles a second.

Run by `tests.bench.tiling --ratiopath PYTHON` in an interpreter that has ratiopath, which this project does not need:
`rival_ratiopath.py SLIDE FOLDER`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ratiopath.ray import read_slides
from ratiopath.tiling import grid_tiles, read_slide_tiles

EDGE = 256


def tiling(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One slide to its tiles' places."""
    extent = (row["extent_x"], row["extent_y"])
    places = grid_tiles(slide_extent=extent, tile_extent=(EDGE, EDGE), stride=(EDGE, EDGE), last="drop")
    common = {"path": row["path"], "level": row["level"], "tile_extent_x": EDGE, "tile_extent_y": EDGE}
    return [{"tile_x": int(x), "tile_y": int(y), **common} for x, y in places]


def stage(slide: str, folder: str) -> int:
    """Slide to Parquet; how many tiles it became."""
    slides = read_slides([slide], tile_extent=EDGE, stride=EDGE, mpp=0.5)
    tiles = slides.flat_map(tiling).repartition(16).map_batches(read_slide_tiles, num_cpus=1, batch_size=128)
    tiles.write_parquet(folder)
    return int(ray.data.read_parquet(folder, columns=["tile_x"]).count())


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    start = time.perf_counter()
    count = stage(sys.argv[1], str(Path(sys.argv[2]).absolute()))
    print(json.dumps({"rate": count / (time.perf_counter() - start), "tiles": count}))
