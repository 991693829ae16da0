"""The patch store: commits, deterministic bytes, exact reads."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from pipeline import patches, storage
from pipeline.cohort import CohortSlide
from pipeline.config_data import TilingConfig
from pipeline.errors import SlideError, StorageError
from pipeline.patches import PatchStore, SlideStatus, StoredSlide, slide_key
from pipeline.schema import PATCHES
from pipeline.slide import open_slide
from pipeline.storage import SourceVersion
from pipeline.tiling import PatchRow, tile_slide
from tests.synth import tissue_rgb, write_pyramid

RGB = tissue_rgb(1013, 787)
SPEC = TilingConfig(patch_px=32, min_tissue=0.4)
VERSION = SourceVersion(1, None, 2.0)


def cohort_slide(uri: str, mpp: float | None = None) -> CohortSlide:
    return CohortSlide("s1", uri, "p1", None, mpp, {}, {})


def write(store: Path, source: Path, digest: str = "d1") -> StoredSlide:
    with open_slide(source) as reader:
        tiling = tile_slide(reader, SPEC, 0.5)
        return PatchStore(str(store), SPEC.fingerprint()).write(digest, 0.5, reader, tiling, tiling.rows())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB)


@pytest.fixture
def stored(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> StoredSlide:
    """A slide of several parts of several batches."""
    monkeypatch.setattr(patches, "BATCH_PATCHES", 37)
    monkeypatch.setattr(patches, "PART_PATCHES", 101)
    return write(tmp_path / "store", source)


def test_offsets_point_at_the_jpegs(stored: StoredSlide) -> None:
    index = stored.index()
    assert stored.n_patches == len(index.x) > 202
    assert index.part.max() == 2
    for row in range(0, stored.n_patches, 13):
        data = (Path(stored.uri) / f"part-{index.part[row]:05d}.arrow").read_bytes()
        image = data[index.offset[row] : index.offset[row] + index.length[row]]
        assert image.startswith(b"\xff\xd8")
        assert image.endswith(b"\xff\xd9")
        x, y = index.x[row], index.y[row]
        assert np.abs(simplejpeg.decode_jpeg(image).astype(int) - RGB[y : y + 32, x : x + 32]).mean() < 8


def test_parts_are_plain_arrow_files(stored: StoredSlide) -> None:
    tables = []
    for path in sorted(Path(stored.uri).glob("part-*.arrow")):
        with pa.ipc.open_file(path) as reader:
            assert reader.schema.equals(PATCHES, check_metadata=True)
            tables.append(reader.read_all())
    table = pa.concat_tables(tables)
    assert table.column("row").to_pylist() == list(range(stored.n_patches))
    assert table.column("image").to_pylist() == stored.payloads(range(stored.n_patches))


def test_payloads_come_in_the_order_asked_for(stored: StoredSlide) -> None:
    every = stored.payloads(range(stored.n_patches))
    rows = np.random.default_rng(0).integers(0, stored.n_patches, 64)
    assert stored.payloads(rows) == [every[row] for row in rows]
    assert stored.payloads([]) == []


def test_reads_are_exact_and_coalesced(stored: StoredSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    original = storage.read_ranges

    def counted(uri: str, wanted: list[tuple[int, int]]) -> list[bytes]:
        ranges.extend(wanted)
        return original(uri, wanted)

    index = stored.index()
    monkeypatch.setattr(storage, "read_ranges", counted)
    rows = [5, 6, 7, 90, 150, 7]
    stored.payloads(rows)
    assert len(ranges) == 3
    assert sum(length for _, length in ranges) == index.length[[5, 6, 7, 90, 150]].sum()


def test_positions_are_grid_cells(stored: StoredSlide) -> None:
    positions, index = stored.positions(), stored.index()
    assert (positions * 32 == np.stack([index.x, index.y], axis=1)).all()
    assert positions[:, 0].max() > positions[:, 1].max()


def test_two_writers_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", source)
    write(tmp_path / "b", source)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [p.name for p in files] == ["index.parquet", "part-00000.arrow", "slide.json", "thumbnail.jpg"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_record_of_the_commit(stored: StoredSlide) -> None:
    facts = json.loads((Path(stored.uri) / "slide.json").read_text())
    assert facts["key"] == stored.key == slide_key("d1", 0.5)
    assert facts["rejects"] == {"tissue": 31 * 24 - stored.n_patches, "bad-tile": 0}
    assert sum(part["patches"] for part in facts["parts"]) == stored.n_patches
    for entry in [*facts["parts"], facts["index"]]:
        data = (Path(stored.uri) / entry["name"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"])
    assert "max_bad_slides" not in facts["spec"]


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


def test_the_commit_is_written_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = storage.write_bytes

    def noted(uri: str, data: bytes) -> None:
        written.append(uri.rpartition("/")[2])
        original(uri, data)

    monkeypatch.setattr(storage, "write_bytes", noted)
    write(tmp_path, source)
    assert written[-1] == "slide.json"
    assert sorted(written)[:2] == ["index.parquet", "part-00000.arrow"]


def test_a_slide_that_fails_midway_is_not_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PART_PATCHES", 50)

    def failing(rows: Iterator[PatchRow]) -> Iterator[PatchRow]:
        for row, _ in zip(rows, range(120), strict=False):
            yield row
        raise SlideError("bad-tiles", "too many")

    store = PatchStore(str(tmp_path), SPEC.fingerprint())
    with open_slide(source) as reader:
        tiling = tile_slide(reader, SPEC, 0.5)
        with pytest.raises(SlideError, match="too many"):
            store.write("d1", 0.5, reader, tiling, failing(tiling.rows()))
    assert len(list(tmp_path.rglob("part-*.arrow"))) == 2
    assert not store.has(slide_key("d1", 0.5))
    with pytest.raises(StorageError, match="run the tile stage"):
        store.slide(slide_key("d1", 0.5))


def test_parts_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "PART_BYTES", 1000)
    rows = [PatchRow(i, 0, 0, bytes(300)) for i in range(10)]
    assert [(len(part), first) for part, first in patches._parts(iter(rows))] == [(4, 0), (4, 4), (2, 8)]


def test_keys_tell_content_and_mpp_apart() -> None:
    assert len({slide_key("a", 0.5), slide_key("b", 0.5), slide_key("a", 0.25), slide_key("a", None)}) == 4


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
    Path(stored.uri, "slide.json").unlink()
    assert store.status(slide, VERSION) is None


def test_quarantine_is_remembered(tmp_path: Path) -> None:
    store = PatchStore(str(tmp_path), SPEC.fingerprint())
    slide = cohort_slide("/data/a.tiff")
    status = SlideStatus("s1", slide.uri, None, "quarantined", "no-tissue: none", error="Traceback ...")
    store.record(slide, VERSION, status)
    assert store.status(slide, VERSION) == status
