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


def coordinates_rgb(width: int, height: int) -> RGB:
    """Px that say where they are, modulo 128, and survive JPEG: red and green x and y mod 32, blue their 32s mod 4."""
    y, x = np.mgrid[0:height, 0:width]
    blue = x // 32 % 4 * 64 + y // 32 % 4 * 16
    return np.stack([x % 32 * 8, y % 32 * 8, blue], axis=2).astype(np.uint8)


def coordinates_of(pixels: Sequence[int] | RGB) -> tuple[float, float]:
    """x and y mod 128 of one px (3,)."""
    red, green, blue = (int(value) for value in pixels[:3])
    across = round(blue / 16)
    return across // 4 % 4 * 32 + red / 8, across % 4 * 32 + green / 8


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
    pq.write_table(pa.Table.from_pylist(rows), out / "predictions.parquet")
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
        maps["effect_tumour_lesion"] = {"version": 1, "definition": "left out", "unit": "log odds without the patch"}
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
        "colours": {"score": {"low": 1.0, "high": 20.0, "quantile": 0.999}, "effect": {"low": -1.5, "high": 1.5}},
    }
    (folder / "slide.json").write_text(json.dumps(said))
