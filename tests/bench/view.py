"""What the viewer takes: the first view of a slide of 16,384 px, single tiles on one core, memory after 5,000.

    python -m tests.bench.view [--folder DIR] [--tiles 5000]

The server is the command itself in a process that may use one core; tiles are asked for one after another, each but
once, over one connection. Reference in the same run: the same tiles read without HTTP in this process, on that core.
The first view is a browser's (Chromium without a window, its cache empty): from the address being opened to the last
tile of slide and attention being drawn.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.demo.tiff import write_pyramid
from pipeline.slides.open import open_slide
from pipeline.view.pyramid import steps
from pipeline.view.tiles import tile
from tests.pipeline.view.browser import chromium
from tests.pipeline.view.made import grid, write_output
from tests.synth import tissue_rgb

EDGE, PATCH, VIEWS = 16_384, 256, 5


def prepared(folder: Path) -> Path:
    """A slide of EDGE px in JPEG tiles of 256 px with all levels, and a prediction of its 4,096 patches."""
    slide = folder / "slide.tif"
    if not slide.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        square = np.dstack([tissue_rgb(2048, 2048), np.zeros((2048, 2048), np.uint8)])
        write_pyramid(slide, np.tile(square, (EDGE // 2048, EDGE // 2048, 1)), 0.25)
    out = folder / "out"
    if not out.is_dir():
        corners, size = grid(EDGE, EDGE, PATCH, PATCH)
        score = np.random.default_rng(0).lognormal(0, 1, len(corners))
        said = {
            "uri": slide, "dimensions": (EDGE, EDGE), "corners": corners, "size": size, "score": score / score.mean(),
            "selected": score > np.sort(score)[-64], "mpp": 0.25,
        }  # fmt: skip
        write_output(out, {"slide": said})
    return out


@contextmanager
def command(out: Path, *, cores: int | None = None) -> Iterator[tuple[psutil.Process, int]]:
    """The command, in a process that may use this many cores; and its port."""

    def bound() -> None:
        if cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    line = [sys.executable, "-m", "pipeline", "view", str(out), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, preexec_fn=bound) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        try:
            yield psutil.Process(process.pid), int(address.rsplit(":", 1)[1].rstrip("/\n"))
        finally:
            process.terminate()


def first_views(out: Path) -> list[float]:
    """Seconds, each of a server and a browser that are new."""
    found = []
    for _ in range(VIEWS):
        with command(out) as (_, port), chromium() as browser:
            browser.get(f"http://127.0.0.1:{port}/")
            ms = browser.execute_async_script(
                "const told = arguments[0]; const look = () =>"
                " window.settled?.() ? told(performance.now()) : requestAnimationFrame(look); look()"
            )
            found.append(ms / 1000)
    return found


def _get(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status == 200, (path, data[:100])
    return data


def _paths(said: dict[str, Any], tag: str, layer: int, count: int) -> dict[str, list[str]]:
    """Tiles by kind, each once, in a drawn order."""

    def all_of(made: Sequence[dict[str, Any]], kind: str) -> Iterator[tuple[int, str]]:
        for step, one in enumerate(made):
            for column in range(one["columns"]):
                for row in range(one["rows"]):
                    yield step, f"/{tag}/0/{kind}/{step}/{column}/{row}"

    draw = random.Random(0)
    tiles = list(all_of(said["steps"], "tile"))
    raw = [path for step, path in tiles if said["steps"][step]["tileWidth"] == PATCH]
    found = {"tile of the file": raw, "layer": [path for _, path in all_of(said["layerSteps"], f"layer/{layer}")]}
    for paths in found.values():
        draw.shuffle(paths)
    return {kind: paths[:count] for kind, paths in found.items()}


def _timed(act: Callable[[str], object], over: Sequence[str]) -> list[float]:
    """Milliseconds of each."""
    found = []
    for one in over:
        began = time.perf_counter()
        act(one)
        found.append(1000 * (time.perf_counter() - began))
    return found


def tiles(out: Path, count: int) -> dict[str, Any]:
    """Milliseconds by kind, and memory before and after `count` of them."""
    with command(out, cores=1) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        listed = json.loads(_get(connection, "/slides"))
        layer = next(number for number, one in enumerate(listed["layers"]) if one["name"] == "attention")
        said = json.loads(_get(connection, f"/{listed['tag']}/0"))
        before = process.memory_info().rss
        paths = _paths(said, listed["tag"], layer, count)
        times = {kind: _timed(lambda path: _get(connection, path), some) for kind, some in paths.items()}
        most = process.memory_info().rss
        connection.close()
    return {"times": times, "paths": paths, "before": before, "after": most, "tiles": sum(map(len, paths.values()))}


def bare(slide: Path, paths: Sequence[str]) -> list[float]:
    """Milliseconds of the same tiles without HTTP."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    with open_slide(slide) as reader:
        made = steps(reader.levels, [reader.native_tiles(number) for number in range(len(reader.levels))])

        def act(path: str) -> None:
            step, column, row = map(int, path.split("/")[-3:])
            tile(reader, made[step], column, row)

        return _timed(act, paths)


def made_tiles(slide: Path, count: int = 200) -> list[float]:
    """Milliseconds of tiles that are made: of a slide of one level and the same tiles, four are read and shrunk."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    with open_slide(slide) as reader:
        half = steps(reader.levels[:1], [reader.native_tiles(0)])[-2]
        draw = random.Random(0)
        places = [(draw.randrange(half.columns), draw.randrange(half.rows)) for _ in range(count)]
        return _timed(lambda place: tile(reader, half, *map(int, place.split())), [f"{x} {y}" for x, y in places])


def main() -> None:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-view"))
    parser.add_argument("--tiles", type=int, default=4000)
    given = parser.parse_args()
    out = prepared(given.folder)
    views = first_views(out)
    found = tiles(out, given.tiles)
    times = {
        **found["times"],
        "tile of the file, no HTTP": bare(given.folder / "slide.tif", found["paths"]["tile of the file"]),
    }
    times["tile made of level 0, no HTTP"] = made_tiles(given.folder / "slide.tif")
    rows = {
        kind: {"n": len(ms), "median_ms": statistics.median(ms), "p95_ms": sorted(ms)[int(0.95 * len(ms))]}
        for kind, ms in times.items()
    }
    print(f"first view: median {statistics.median(views):.2f} s of {', '.join(f'{view:.2f}' for view in views)}")
    for kind, row in rows.items():
        print(f"{kind:32} {row['n']:5} tiles   median {row['median_ms']:6.2f} ms   95% {row['p95_ms']:6.2f} ms")
    print(
        f"memory: {found['before'] / 2**20:.0f} MiB before, {found['after'] / 2**20:.0f} after {found['tiles']} tiles"
    )
    print(json.dumps({"views": views, "tiles": rows, "before": found["before"], "after": found["after"]}))


if __name__ == "__main__":
    main()
