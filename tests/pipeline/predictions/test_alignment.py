"""What is drawn and listed of a patch lies where its pixels are, at all four corners of a slide, to one px of level 0.

The slide is a noise in which no place looks like another, so a patch's own pixels say where it was cut. Heatmaps of
others drift to the lower right where a patch's size in px is rounded, so sizes here are broken numbers.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image
from shapely.geometry import shape

from pipeline.config.data import TilingConfig
from pipeline.ingest.tiler import store_slide
from pipeline.predictions.finish import Finishing
from pipeline.predictions.maps import as_parquet
from pipeline.predictions.run import How, predict
from pipeline.store.patches import PatchStore
from tests.oracle import patch_of
from tests.pipeline.small import small_config, write_model
from tests.pipeline.tiled import row
from tests.synth import leica_xml, write_pyramid

WIDTH, HEIGHT = 877, 691
PLACES: dict[str, tuple[float, dict[str, Any]]] = {
    "rounded": (0.2527, {"patch_px": 64, "mpp": 0.5}),
    "another level": (0.2527, {"patch_px": 37, "mpp": 1.17}),
    "level 1 as it is": (0.2527, {"patch_px": 61, "mpp": 0.506, "mpp_tolerance": 0.02}),
    "overlap": (0.2527, {"patch_px": 64, "overlap_px": 19, "mpp": 0.5}),
    "level 0": (0.2527, {"patch_px": 61, "mpp": None}),
    "bounds": (0.5, {"patch_px": 53, "mpp": 0.61}),
}


def _noise(width: int, height: int) -> np.ndarray:
    """Dark enough for tissue, in colours of blocks of 5 px."""
    blocks = np.random.default_rng(5).integers((120, 20, 110), (230, 120, 210), (height // 5 + 1, width // 5 + 1, 3))
    return np.kron(blocks, np.ones((5, 5, 1)))[:height, :width].astype(np.uint8)


def _slide(name: str, folder: Path) -> tuple[Path, np.ndarray, tuple[int, int]]:
    """A file, what its level 0 shows, and where its bounds are."""
    mpp, _ = PLACES[name]
    if name != "bounds":
        rgb = _noise(WIDTH, HEIGHT)
        return write_pyramid(folder / "a.tif", rgb, levels=2, mpp=mpp, quality=97), rgb, (0, 0)
    rgb, corner, canvas = _noise(701, 503), (101, 67), (877, 691)
    sizes = [(701, 503), (350, 251), (175, 125)]
    path = write_pyramid(folder / "a.scn", rgb, description=leica_xml(sizes, canvas, corner, mpp), quality=97)
    whole = np.full((canvas[1], canvas[0], 3), 255, np.uint8)
    whole[corner[1] : corner[1] + 503, corner[0] : corner[0] + 701] = rgb
    return path, whole, corner


def _corners(maps: dict[str, np.ndarray]) -> list[int]:
    """Rows of the patches that lie nearest to the slide's four corners."""
    ends = [(maps["x"].min(), maps["x"].max()), (maps["y"].min(), maps["y"].max())]
    return [int(np.hypot(maps["x"] - x, maps["y"] - y).argmin()) for x in ends[0] for y in ends[1]]


def _found_at(picture: np.ndarray, jpeg: bytes, x: int, y: int, size: float) -> tuple[int, int]:
    """By how many px a patch's pixels lie elsewhere than at x and y."""
    pixels = simplejpeg.decode_jpeg(jpeg).astype(float)
    whole = Image.fromarray(picture)

    def misses(shift: tuple[int, int]) -> float:
        expected = patch_of(whole, (x + shift[0], y + shift[1]), size, len(pixels)).astype(float)
        return float(((pixels - expected)[1:-1, 1:-1] ** 2).mean())

    shifts = [(a, b) for a in range(-3, 4) for b in range(-3, 4) if x + a >= 0 and y + b >= 0]
    return min(shifts, key=misses)


def _hot(out: Path, at: int) -> tuple[float, float, float, float]:
    """Level-0 px of what an overlay colours where one patch has all the attention."""
    place, folder = out / "slides" / "a" / "attention.parquet", out / "slides" / "a"
    kept, facts = place.read_bytes(), json.loads((folder / "slide.json").read_text())
    table = pq.read_table(io.BytesIO(kept))
    weights = np.zeros(len(table), np.float32)
    weights[at] = 1
    place.write_bytes(as_parquet(table.set_column(table.schema.get_field_index("attention"), "attention", [weights])))
    Finishing({"score": {"low": 1.0, "high": 5.0, "quantile": float(at)}}, ["tumour_no", "tumour_yes"]).finish(
        str(folder)
    )
    place.write_bytes(kept)
    box, (width, height) = json.loads((folder / "slide.json").read_text())["overlay"], facts["dimensions"]
    picture = np.asarray(Image.open(folder / "overlay.png").convert("RGB")).astype(int)
    slide = picture[box["top"] : box["top"] + box["height"], box["left"] : box["left"] + box["width"]]
    rows, columns = np.nonzero((slide[..., 0] > 200) & (slide[..., 1] > 200) & (slide[..., 2] < slide[..., 0] - 25))
    x, y = width / box["width"], height / box["height"]
    return columns.min() * x, rows.min() * y, (columns.max() + 1) * x, (rows.max() + 1) * y


@pytest.mark.parametrize("name", PLACES)
def test_patches_outlines_and_overlay_are_where_the_pixels_are(name: str, tmp_path: Path) -> None:
    path, picture, origin = _slide(name, tmp_path)
    config = small_config(tiling={**PLACES[name][1], "min_tissue": 0.3, "edge": "inside"})
    out = tmp_path / "out"
    predict(
        str(write_model(tmp_path, config)), [str(path)], None, out, tracking_uri="unused", how=How(all_patches=True)
    )
    folder = out / "slides" / "a"
    facts = json.loads((folder / "slide.json").read_text())
    table = pq.read_table(folder / "attention.parquet")
    maps = {column: table[column].to_numpy() for column in ("x", "y", "size")}
    assert facts["dimensions"] == [picture.shape[1], picture.shape[0]]
    assert facts["origin"] == list(origin)
    listed = json.loads(gzip.decompress((folder / "all.geojson.gz").read_bytes()))["features"]
    top = {one["properties"]["measurements"]["row"]: one for one in _top(folder)}
    jpegs = _payloads(path, config.tiling, tmp_path)
    for at in _corners(maps):
        x, y, size = int(maps["x"][at]), int(maps["y"][at]), float(maps["size"][at])
        assert np.abs(_found_at(picture, jpegs[at], x, y, size)).max() <= 1
        expected = np.array([x, y, x + size, y + size])
        for one in [listed[at], *([top[at]] if at in top else [])]:
            bounds = np.add(shape(one["geometry"]).bounds, (*origin, *origin))
            assert np.abs(bounds - expected).max() <= 1
        assert np.abs(np.array(_hot(out, at)) - expected).max() <= 1


def _top(folder: Path) -> list[dict[str, Any]]:
    features = json.loads((folder / "top.geojson").read_text())["features"]
    return [one for one in features if one["properties"]["objectType"] == "detection"]


def _payloads(path: Path, spec: TilingConfig, folder: Path) -> list[bytes]:
    """The patches' JPEGs, as the tile stage stores them."""
    status = store_slide(row(path), spec, str(folder / "store"))
    stored = PatchStore(str(folder / "store"), spec.fingerprint()).slide(str(status.key))
    return stored.payloads(range(stored.n_patches))
