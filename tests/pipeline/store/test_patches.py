"""The patch store: what is committed, what became of each source, exact reads."""

from __future__ import annotations

import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.schema import INDEX
from pipeline.slides.open import open_slide
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store import parts
from pipeline.store.commit import plan_slide, write_slide
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.store.rows import slide_key
from pipeline.tiling.slide import tile_slide
from tests.pipeline.tiled import part_file
from tests.synth import tissue_rgb, write_pyramid

RGB = tissue_rgb(1013, 787)
SPEC = TilingConfig(patch_px=32, min_tissue=0.4)
VERSION = SourceVersion(1, None, 2.0)


def cohort_slide(uri: str, mpp: float | None = None) -> CohortSlide:
    return CohortSlide("s1", uri, "p1", None, mpp, {}, {})


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredSlide:
    """A slide of several parts of several batches."""
    monkeypatch.setattr(parts, "BATCH_PATCHES", 37)
    monkeypatch.setattr(parts, "MAX_PART_PATCHES", 101)
    source = write_pyramid(tmp_path / "a.tiff", RGB)
    with open_slide(source) as reader:
        planned = plan_slide("d1", 0.5, reader, tile_slide(reader, SPEC, 0.5))
        return write_slide(PatchStore(str(tmp_path / "store"), SPEC.fingerprint()), planned, lambda: None)


def test_offsets_point_at_the_jpegs(stored: StoredSlide) -> None:
    index = stored.index()
    assert stored.n_patches == len(index.x) > 202
    assert index.part.max() == 2
    for row in range(0, stored.n_patches, 13):
        data = part_file(stored.uri, index.part[row]).read_bytes()
        image = data[index.offset[row] : index.offset[row] + index.length[row]]
        assert image.startswith(b"\xff\xd8")
        assert image.endswith(b"\xff\xd9")
        x, y = index.x[row], index.y[row]
        assert np.abs(simplejpeg.decode_jpeg(image).astype(int) - RGB[y : y + 32, x : x + 32]).mean() < 8


def test_payloads_come_in_the_order_asked_for(stored: StoredSlide) -> None:
    every = stored.payloads(range(stored.n_patches))
    rows = np.random.default_rng(0).integers(0, stored.n_patches, 64)
    assert stored.payloads(rows) == [every[row] for row in rows]
    assert stored.payloads([]) == []


def test_stores_whose_parts_have_plain_names_are_read_as_ever(stored: StoredSlide, tmp_path: Path) -> None:
    old = Path(shutil.copytree(stored.uri, tmp_path / "old"))
    for number in range(3):
        part_file(old, number).rename(old / f"part-{number:05d}.arrow")
    table = pq.read_table(old / "index.parquet")
    pq.write_table(table.replace_schema_metadata(INDEX.metadata), old / "index.parquet")
    rows = range(stored.n_patches)
    assert replace(stored, uri=str(old)).payloads(rows) == stored.payloads(rows)


def test_reads_are_exact_and_coalesced(stored: StoredSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    original = files.read_ranges

    def counted(uri: str, wanted: list[tuple[int, int]]) -> list[bytes]:
        ranges.extend(wanted)
        return original(uri, wanted)

    index = stored.index()
    monkeypatch.setattr(files, "read_ranges", counted)
    rows = [5, 6, 7, 90, 150, 7]
    stored.payloads(rows)
    assert len(ranges) == 3
    assert sum(length for _, length in ranges) == index.length[[5, 6, 7, 90, 150]].sum()


def test_positions_are_grid_cells(stored: StoredSlide) -> None:
    positions, index = stored.positions(np.arange(stored.n_patches)), stored.index()
    assert (positions * 32 == np.stack([index.x, index.y], axis=1)).all()
    assert positions[:, 0].max() > positions[:, 1].max()


def test_a_stored_slide_is_small_and_picklable(stored: StoredSlide) -> None:
    stored.index()
    data = pickle.dumps(stored)
    assert len(data) < 1000
    assert pickle.loads(data) == stored
    assert (stored.dimensions, stored.extent, stored.patch_px, stored.mpp) == ((1013, 787), 32.0, 32, 0.5)


def test_thumbnail_fits_its_scale(stored: StoredSlide) -> None:
    with Image.open(io.BytesIO(stored.thumbnail())) as image:
        assert image.size == (512, 398)
    assert stored.thumbnail_scale == pytest.approx(1013 / 512)


def test_keys_tell_content_mpp_guide_and_series_apart() -> None:
    others: list[tuple[str, float | None, str | None, int | None]] = [
        ("a", 0.5, None, None),
        ("b", 0.5, None, None),
        ("a", 0.25, None, None),
        ("a", None, None, None),
        ("a", 0.5, "g", None),
        ("a", 0.5, None, 0),
        ("a", 0.5, None, 1),
    ]
    assert len({slide_key(*identity) for identity in others}) == len(others)


def test_status_is_valid_for_one_version_uri_and_override(stored: StoredSlide, tmp_path: Path) -> None:
    store = PatchStore(str(tmp_path / "store"), SPEC.fingerprint())
    slide = cohort_slide("/data/a.tiff")
    status = SlideStatus("s1", slide.uri, stored.key, "committed", n_patches=stored.n_patches)
    assert store.status(slide, VERSION) is None
    store.record(slide, VERSION, status)
    assert store.status(slide, VERSION) == status
    assert store.status(slide, SourceVersion(1, None, 3.0)) is None
    assert store.status(cohort_slide("/data/b.tiff"), VERSION) is None
    assert store.status(cohort_slide("/data/a.tiff", 0.25), VERSION) is None
    assert store.status(replace(slide, series=0), VERSION) is None
    Path(stored.uri, "slide.json").unlink()
    assert store.status(slide, VERSION) is None


def test_quarantine_is_remembered(tmp_path: Path) -> None:
    store = PatchStore(str(tmp_path), SPEC.fingerprint())
    slide = cohort_slide("/data/a.tiff")
    status = SlideStatus("s1", slide.uri, None, "quarantined", "no-tissue: none", error="Traceback ...")
    store.record(slide, VERSION, status)
    assert store.status(slide, VERSION) == status


def test_counts_are_those_of_the_slide_that_is_there(stored: StoredSlide, tmp_path: Path) -> None:
    """A plan that is made anew after a patch could not be decoded has fewer; whichever row has the lower id."""
    slide = cohort_slide(str(tmp_path / "a.tiff"))
    status = SlideStatus("s1", slide.uri, stored.key, "committed", None, stored.n_patches)
    patches = PatchStore(str(tmp_path / "store"), SPEC.fingerprint())
    for _ in range(8):
        patches.append(patches.rows(slide, VERSION, replace(status, n_patches=stored.n_patches + 1)))
        patches.forget([stored.key])
    assert patches.status(slide, VERSION) is None
    patches.record(slide, VERSION, status)
    assert patches.status(slide, VERSION) == status
