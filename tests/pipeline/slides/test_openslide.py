"""OpenSlide: which files it takes, and a slide that vanishes. What it reads: with the other reader, in test_slide."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.errors import BadTileError, SlideError
from pipeline.ingest.tiler import store_slide
from pipeline.slides.open import open_slide
from pipeline.slides.openslide import LIBRARY_VERSION, OpenSlideReader, _bounds, is_openslide
from pipeline.store.patches import PatchStore
from pipeline.tiling.evidence import OUTLINE
from tests.pipeline.tiled import PATCH, SPEC, row
from tests.synth import leica_xml, tissue_rgb, write_pyramid, zero_tile

RGB = tissue_rgb(1013, 787)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "Schnitt 1 ä.tiff", RGB)


def test_a_slide_that_vanishes_while_read_is_a_slide_error(slide: Path) -> None:
    zero_tile(slide, 0, 0)
    with OpenSlideReader(slide) as reader:
        slide.unlink()
        with pytest.raises(SlideError) as caught:
            reader.read(0, 0, 0, 10, 10)
    assert not isinstance(caught.value, BadTileError)
    assert caught.value.reason == "source"  # it may come back


def test_a_process_without_file_descriptors_is_no_fault_of_the_slide(slide: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(SlideError, match="Too many open files") as caught:
            OpenSlideReader(slide)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.reason == "source"


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EIO, "source"), (errno.ESTALE, "source"), (errno.ENOMEM, "source"), (None, "bad-tile")]
)
def test_an_error_of_the_disk_is_no_bad_tile(
    slide: Path, code: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test makes a disk fail here: OpenSlide's words are put in its place."""
    text = f"Couldn't read file {slide}: {os.strerror(code)}" if code else "Corrupt JPEG data"

    def failing(*_: object) -> None:
        raise openslide.OpenSlideError(text)

    with OpenSlideReader(slide) as reader:
        expected = reader.read(0, 0, 0, 10, 10)
        monkeypatch.setattr(openslide.OpenSlide, "read_region", failing)
        with pytest.raises(SlideError, match=text) as caught:
            reader.read(0, 0, 0, 10, 10)
        assert (caught.value.reason, isinstance(caught.value, BadTileError)) == (reason, code is None)
        monkeypatch.undo()
        assert (reader.read(0, 0, 0, 10, 10) == expected).all()


def test_a_leica_scan_on_its_canvas_is_read_and_tiled(tmp_path: Path) -> None:
    """Only OpenSlide knows where on the canvas the scan lies; the rest is background."""
    sizes, canvas, (left, top) = [(1013, 787), (506, 393), (253, 196)], (1500, 1100), (101, 67)
    path = write_pyramid(tmp_path / "a.scn", RGB, description=leica_xml(sizes, canvas, (left, top), 0.5))
    with open_slide(path) as reader:
        assert isinstance(reader, OpenSlideReader)
        assert (reader.vendor, reader.dimensions) == ("leica", canvas)
        assert reader.bounds == (left, top, 1013, 787)
        assert reader.mpp == pytest.approx((0.5, 0.5))
        assert np.abs(reader.read(0, left, top, 1013, 787).astype(int) - RGB).mean() < 3
        assert (reader.read(0, 0, 0, left, top) == 255).all()
        assert (reader.read(0, left + 1013, 0, 300, 1100) == 255).all()
    status = store_slide(row(path), SPEC, str(tmp_path / "store"))
    stored = PatchStore(str(tmp_path / "store"), SPEC.fingerprint()).slide(str(status.key))
    assert stored.n_patches > 30
    index = stored.index()
    for number, data in enumerate(stored.payloads(range(stored.n_patches))):
        x, y = int(index.x[number]) - left, int(index.y[number]) - top
        if 0 <= x <= 1013 - PATCH and 0 <= y <= 787 - PATCH:
            patch = simplejpeg.decode_jpeg(data).astype(int)
            assert np.abs(patch - RGB[y : y + PATCH, x : x + PATCH]).mean() < 8


def test_the_outline_of_a_leica_scan_lies_in_what_qupath_shows_of_it_and_names_the_same_patches(tmp_path: Path) -> None:
    (left, top), sizes = (350, 210), [(1013, 787), (506, 393), (253, 196)]
    path = write_pyramid(tmp_path / "a.scn", RGB, description=leica_xml(sizes, (1500, 1100), (left, top), 0.5))
    store = PatchStore(str(tmp_path / "store"), SPEC.fingerprint())

    def corners(slide: CohortSlide) -> np.ndarray:
        stored = store.slide(str(store_slide(slide, SPEC, str(tmp_path / "store")).key))
        index = stored.index()
        shutil.copy(Path(stored.uri) / OUTLINE, tmp_path / "tissue.geojson")
        return np.stack([index.x, index.y], axis=1)

    plain = corners(row(path))
    rings = [
        ring
        for feature in json.loads((tmp_path / "tissue.geojson").read_text())["features"]
        for ring in feature["geometry"]["coordinates"]
    ]
    points = np.concatenate(rings)
    assert (points >= 0).all()
    assert (points <= [1013, 787]).all()
    masked = corners(replace(row(path), mask=str(tmp_path / "tissue.geojson")))
    assert len({*map(tuple, plain.tolist())} ^ {*map(tuple, masked.tolist())}) < 0.05 * len(plain)


def test_bounds_that_make_no_sense_are_none() -> None:
    stated = {"openslide.bounds-x": "10", "openslide.bounds-y": "20", "openslide.bounds-width": "30"}
    assert _bounds({**stated, "openslide.bounds-height": "40"}, (40, 60)) == (10, 20, 30, 40)
    for nonsense in (
        {},
        {"openslide.bounds-height": "x"},
        {"openslide.bounds-height": "41"},
        {"openslide.bounds-height": "0"},
    ):
        assert _bounds({**stated, **nonsense}, (40, 60)) == (0, 0, 40, 60)


def test_which_files_are_slides(slide: Path, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert is_openslide(slide)
    assert not is_openslide(tmp_path / "a.png")
    assert LIBRARY_VERSION >= "4.0.1"
