"""Slides and predictions to look at, written as `predict` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.tiling.geojson import tissue_geojson
from tests.synth import RGB

Floats = npt.NDArray[np.float64]


SLOPE = 3.5  # grey values a px: JPEG's errors are below, and the waves have no jumps that it would blur


def coordinates_rgb(width: int, height: int) -> RGB:
    """Px that say where they are, modulo 128: red and green are waves of x and y, blue on which side of them one is."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = (16 + SLOPE * np.abs(place % 128 - 64) for place in (x, y))
    blue = x // 64 % 2 * 128 + y // 64 % 2 * 64 + 32
    rgb: RGB = np.rint(np.stack([red, green, blue], axis=2)).astype(np.uint8)
    return rgb


def coordinates_of(pixels: Sequence[int] | RGB) -> tuple[float, float]:
    """x and y mod 128 of one px (3,), which does not lie by a multiple of 64."""
    red, green, blue = (int(value) for value in pixels[:3])
    right, below = blue // 128, blue // 64 % 2
    return tuple(64 + (2 * side - 1) * (wave - 16) / SLOPE for side, wave in ((right, red), (below, green)))  # type: ignore[return-value]


def apart(seen: float, meant: float) -> float:
    """Distance of two places modulo 128."""
    return abs((seen - meant + 64) % 128 - 64)


def grid(width: int, height: int, extent: float, stride: float) -> tuple[Floats, Floats]:
    """Corners (n, 2) of patches on a grid, rounded as the tile stage rounds them, and their sizes (n,)."""
    columns, rows = (int((edge - extent) // stride) + 1 for edge in (width, height))
    corners = np.array([[column * stride, row * stride] for row in range(rows) for column in range(columns)])
    return np.rint(corners), np.full(len(corners), extent)


def write_output(out: Path, slides: Mapping[str, Mapping[str, Any]], *, model: str = "models:/demo/3") -> Path:
    """A folder as `predict` leaves it.

    Each slide: `uri` and, unless it failed (`error`), `dimensions`, `corners` (n, 2), `size` (n,), `score` (n,),
    `selected` (n,), and as they are wanted `effect` (n,), `mpp`, `label`, `p`, `origin`, `mask` (of the whole slide).
    """
    rows = []
    for slide_id, slide in slides.items():
        failed = "error" in slide
        rows.append(
            {
                "slide_id": slide_id,
                "uri": str(slide["uri"]),
                "folder": None if failed else f"slides/{slide_id}",
                "mpp": slide.get("mpp"),
                "tumour_lesion": None if failed else slide.get("p", 0.5),
                "tumour_lesion_low": None if failed else slide.get("p", 0.5) - 0.1,
                "tumour_lesion_high": None if failed else slide.get("p", 0.5) + 0.1,
                "tumour_label": slide.get("label"),
                "status": "failed" if failed else "predicted",
                "reason": "missing" if failed else None,
                "error": slide.get("error"),
            }
        )
        if not failed:
            _write_slide(out / "slides" / slide_id, slide_id, slide, model)
    table = pa.Table.from_pylist(rows)
    fields = [
        one.with_metadata({"ips.interval": "calibrated", "ips.tested": "40"})
        if one.name.endswith(("_low", "_high"))
        else one
        for one in table.schema
    ]
    pq.write_table(table.cast(pa.schema(fields)), out / "predictions.parquet")
    return out


def _write_slide(folder: Path, slide_id: str, slide: Mapping[str, Any], model: str) -> None:
    folder.mkdir(parents=True)
    corners, score = np.asarray(slide["corners"]), np.asarray(slide["score"], np.float32)
    columns = {
        "row": np.arange(len(corners)),
        "x": corners[:, 0].astype(np.int64),
        "y": corners[:, 1].astype(np.int64),
        "size": np.asarray(slide["size"], np.float32),
        "score": score,
        "attention": score / len(score),
        "selected": np.asarray(slide["selected"], bool),
    }
    maps: dict[str, Any] = {"score": {"version": 1, "definition": "attention times patches", "unit": "uniform = 1"}}
    if "effect" in slide:
        columns["effect_tumour_lesion"] = np.asarray(slide["effect"], np.float32)
        maps["effect_tumour_lesion"] = {"version": 1, "definition": "with it less without it", "unit": "log odds"}
    pq.write_table(pa.table(columns), folder / "attention.parquet")
    origin = tuple(slide.get("origin", (0, 0)))
    if "mask" in slide:
        (folder / "tissue.geojson").write_bytes(tissue_geojson(slide["mask"], slide["dimensions"], origin))
    said = {
        "slide_id": slide_id,
        "uri": str(slide["uri"]),
        "series": None,
        "dimensions": list(slide["dimensions"]),
        "mpp": slide.get("mpp"),
        "origin": list(origin),
        "model": {"source": model},
        "maps": maps,
        "sentences": ["Attention is not effect."],
        "colours": {"score": {"low": 1.0, "high": 20.0, "quantile": 0.999}, "effect": {"low": -1.5, "high": 1.5}},
    }
    (folder / "slide.json").write_text(json.dumps(said))
