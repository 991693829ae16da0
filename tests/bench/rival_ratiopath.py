"""ratiopath's way from slides to tiles in Parquet files, as its documentation shows it; prints tiles and seconds.

Run by `tests.bench.tiling --ratiopath PYTHON` in an interpreter that has ratiopath, which this project does not need:

    python3.11 -m venv ratiopath-venv
    ratiopath-venv/bin/pip install ratiopath==1.0.3 "ray[data]==2.60.*" openslide-bin pyvips-binary
    ratiopath-venv/bin/python -m tests.bench.rival_ratiopath FOLDER SLIDE...
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

from tests.bench.processes import cpu_seconds

EDGE = 256


def tiling(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One slide to its tiles' places."""
    extent = (row["extent_x"], row["extent_y"])
    places = grid_tiles(slide_extent=extent, tile_extent=(EDGE, EDGE), stride=(EDGE, EDGE), last="drop")
    common = {"path": row["path"], "level": row["level"], "tile_extent_x": EDGE, "tile_extent_y": EDGE}
    return [{"tile_x": int(x), "tile_y": int(y), **common} for x, y in places]


def stage(slides: list[str], folder: str) -> int:
    """Slides to Parquet; how many tiles they became."""
    opened = read_slides(slides, tile_extent=EDGE, stride=EDGE, mpp=0.5)
    tiles = opened.flat_map(tiling).repartition(16).map_batches(read_slide_tiles, num_cpus=1, batch_size=128)
    tiles.write_parquet(folder)
    return int(ray.data.read_parquet(folder).select_columns(["tile_x"]).count())


if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    wall, cpu = time.perf_counter(), cpu_seconds()
    count = stage(sys.argv[2:], str(Path(sys.argv[1]).absolute()))
    print(json.dumps({"tiles": count, "wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}))
