from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.ingest.features import index_cohort, index_slide
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.verify import verify_store
from tests.pipeline.formats.test_feature_files import CORNERS, VECTORS, N, clam, stamp, trident
from tests.pipeline.tiled import row

SPEC = TilingConfig(patch_px=512, mpp=0.5)


def indexed(folder: Path, files: dict[str, bytes], spec: TilingConfig = SPEC) -> Sequence[SlideStatus]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    slides = [row(folder / name) for name in files]
    return index_cohort(slides, spec, str(folder / "store"), on_status=lambda _: None)


def test_files_are_indexed_once_and_a_bad_one_fails_alone(tmp_path: Path) -> None:
    files = {"a.h5": trident(), "b.h5": clam(), "half.h5": trident()[:-500], "c.h5": trident(VECTORS + 1)}
    first = indexed(tmp_path, files)
    assert [status.status for status in first] == ["committed", "committed", "quarantined", "committed"]
    assert [status.n_patches for status in first] == [N, N, 0, N]
    assert str(first[2].reason).startswith(f"features: {tmp_path}/half.h5: no whole HDF5 file")
    absent = row(tmp_path / "absent.h5")
    again = index_cohort(
        [row(tmp_path / name) for name in files] + [absent], SPEC, str(tmp_path / "store"), on_status=lambda _: None
    )
    assert [replace(status, error=None) for status in again[:4]] == [replace(status, error=None) for status in first]
    assert str(again[4].reason).startswith("missing: ")
    report = verify_store(str(tmp_path / "store"), 2, lambda *_: None)
    assert (report.damage, report.leftovers, report.slides, report.patches) == ([], [], 3, 3 * N)


def test_the_index_leads_to_the_vectors_and_says_where_they_are(tmp_path: Path) -> None:
    (status,) = indexed(tmp_path, {"a.h5": trident()})
    stored = PatchStore(str(tmp_path / "store"), SPEC.fingerprint()).slide(str(status.key))
    index, data = stored.index(), (tmp_path / "a.h5").read_bytes()
    assert np.array_equal(np.stack([index.x, index.y], axis=1), CORNERS)
    assert (stored.extent, stored.mpp, stored.stride, stored.dimensions) == (1024, 0.25, 1024, (100_001, 90_001))
    read = [data[start : start + size] for start, size in zip(index.offset, index.length, strict=True)]
    assert read == [vector.tobytes() for vector in VECTORS]
    assert stored.positions(np.array([8, 0])).tolist() == [[1, 1], [0, 0]]
    (tmp_path / "t.jpg").write_bytes(stored.thumbnail())
    with Image.open(tmp_path / "t.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert picture.size == (512, round(90_001 / stored.thumbnail_scale))
    dark = np.argwhere(pixels[:, :, 1] < 215)  # where patches are, as the picture's px
    assert dark.min(axis=0).tolist() == [0, 0]
    assert np.abs(dark.max(axis=0) * stored.thumbnail_scale - (6 * 1024, 7 * 1024)).max() < 2 * stored.thumbnail_scale


def test_another_file_under_the_name_is_another_slide(tmp_path: Path) -> None:
    (first,) = indexed(tmp_path, {"a.h5": trident()})
    (second,) = indexed(tmp_path, {"a.h5": trident(VECTORS * 2)})
    assert first.key != second.key
    (copy,) = indexed(tmp_path, {"copy.h5": trident()})
    assert copy.key == first.key
    (other,) = indexed(tmp_path, {"a.h5": trident()}, SPEC.model_copy(update={"mpp": 0.49}))
    assert other.key == first.key  # in the store of another spec
    (larger,) = indexed(tmp_path, {"a.h5": stamp()})
    assert "tiling.patch_px=224 tiling.mpp=1.143" in str(larger.reason)


@pytest.mark.parametrize("name", ["a.h5", "absent.h5"])
def test_one_file_without_a_cohort(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.h5").write_bytes(trident())
    found = [index_slide(row(tmp_path / name), SPEC, str(tmp_path / "store")) for _ in range(2)]
    assert [one.status for one in found] == ["committed" if name == "a.h5" else "quarantined"] * 2
