"""Several slides in one file: each is tiled, stored, streamed and shown as itself."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.bags.streamed import plan_root
from pipeline.cohort.table import CohortSlide
from pipeline.ingest.tiler import begin_slide, store_slide
from pipeline.results.quality import quality_page
from pipeline.results.quality_rows import quality_csv, quality_rows
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.store.verify import verify_store
from tests.pipeline.tiled import RGB, SPEC, open_plan, row
from tests.synth import tissue_rgb

SECTIONS = RGB, tissue_rgb(571, 499, seed=2)
HOW: dict[str, Any] = {
    "tile": (64, 64),
    "compression": "jpeg",
    "subsampling": (1, 1),
    "photometric": "rgb",
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two sections, as fine as each other."""
    path = tmp_path_factory.mktemp("slides") / "two.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        for name, rgb in zip(("upper", "lower"), SECTIONS, strict=True):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(rgb, **HOW, metadata=metadata)
    return path


def of(path: Path, series: int | None) -> CohortSlide:
    """A row of a cohort."""
    return replace(row(path), slide_id=f"series-{series}", series=series)


def check_patches(stored: StoredSlide, payloads: list[bytes], rgb: np.ndarray[Any, Any]) -> None:
    """The patches are those of this picture."""
    assert len(payloads) > 10
    index, edge = stored.index(), round(stored.extent)
    for x, y, data in zip(index.x.tolist(), index.y.tolist(), payloads, strict=True):
        patch = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert np.abs(patch - rgb[y : y + edge, x : x + edge]).mean() < 6


def facts(stored: StoredSlide) -> Mapping[str, Any]:
    """What its commit says."""
    found: Mapping[str, Any] = json.loads((Path(stored.uri) / "slide.json").read_text())
    return found


def test_two_series_of_a_file_are_two_slides(sections: Path, tmp_path: Path) -> None:
    store = PatchStore(str(tmp_path), SPEC.fingerprint())
    statuses = [store_slide(of(sections, series), SPEC, str(tmp_path)) for series in (0, 1, None)]
    assert [status.status for status in statuses] == ["committed", "committed", "quarantined"]
    assert str(statuses[2].reason).startswith(
        "series: two.ome.tif: several images could be the slide: series 0 'upper'"
    )
    keys = [str(status.key) for status in statuses[:2]]
    assert len(set(keys)) == 2
    for series, (key, rgb) in enumerate(zip(keys, SECTIONS, strict=True)):
        stored = store.slide(key)
        assert stored.dimensions == rgb.shape[1::-1]
        check_patches(stored, stored.payloads(range(stored.n_patches)), rgb)
        assert facts(stored)["series"] == series
        assert facts(stored)["image"]["name"] == ("upper", "lower")[series]
    images = [row.image for row in quality_rows(store, statuses)]
    assert images == ["series 0 (upper)", "series 1 (lower)", None]
    report = verify_store(str(tmp_path), 1, lambda done, total: None)
    assert (report.slides, report.damage, report.leftovers) == (2, [], [])
    store.look_again()
    sources = store.catalogue.wide(store.view, ["series"], store.view.sources["id"].combine_chunks())
    assert sorted((row["series"] for rows in sources for row in rows.to_pylist()), key=str) == [0, 1, None]


def test_naming_what_is_taken_anyway_makes_no_other_slide(tmp_path: Path) -> None:
    path = tmp_path / "one.tif"
    with tifffile.TiffWriter(path) as tiff:
        for rgb in (RGB[::4, ::4], RGB):
            tiff.write(rgb, **HOW, resolution=(20_000, 20_000), resolutionunit=3, metadata=None)
    keys = [store_slide(of(path, series), SPEC, str(tmp_path / "store")).key for series in (None, 1)]
    assert keys[0] == keys[1] is not None


def test_series_are_streamed_side_by_side(sections: Path, tmp_path: Path) -> None:
    plans = PatchStore(plan_root(str(tmp_path)), SPEC.fingerprint())
    slides = []
    for series in (0, 1):
        begun = begin_slide(of(sections, series), SPEC, plan_root(str(tmp_path)), whole=True, pixels=False)
        assert isinstance(begun, SlideStatus)
        slides.append(open_plan(of(sections, series), SPEC, plans, begun.key))
    for rows in (slice(0, 2), slice(None)):  # in turns
        for slide, rgb in zip(slides, SECTIONS, strict=True):
            numbers = np.arange(slide.n_patches)[rows]
            found = slide.payloads(numbers)
            if len(numbers) == slide.n_patches:
                check_patches(slide.patches, found, rgb)


def test_the_plane_of_a_stack_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "z.ome.tif"
    with tifffile.TiffWriter(path) as tiff:
        metadata = {"axes": "ZYXS", "Name": "stack", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        blank = np.full_like(RGB, 243)
        tiff.write(np.stack([blank, RGB, blank]), **HOW, metadata=metadata)
    with caplog.at_level(logging.INFO):
        status = store_slide(row(path), SPEC, str(tmp_path / "store"))
    assert "z.ome.tif: focal plane 2 of 3 is read" in caplog.text
    store = PatchStore(str(tmp_path / "store"), SPEC.fingerprint())
    stored = store.slide(str(status.key))
    check_patches(stored, stored.payloads(range(stored.n_patches)), RGB)
    assert facts(stored)["image"] == {
        "series": 0,
        "name": "stack",
        "of": 1,
        "plane": "focal plane 2 of 3",
        "named": False,
    }
    rows = quality_rows(store, [status])
    assert rows[0].image == "series 0 (stack), focal plane 2 of 3"
    assert b"series 0 (stack), focal plane 2 of 3" in quality_csv(rows)
    assert "series 0 (stack), focal plane 2 of 3" in quality_page(store, rows, "study", "abc")
