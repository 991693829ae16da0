"""What a tile worker does: every slide ends in a status, and a killed or repeated worker changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline import storage, tiler, tiling
from pipeline.errors import StorageError
from pipeline.patches import PatchStore
from pipeline.tiler import store_slide
from tests.pipeline.slides import RGB, SPEC, row, spoilt
from tests.synth import write_pyramid


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "good.tiff", RGB, levels=2)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_good_slide_is_committed(good: Path, store: Path) -> None:
    status = store_slide(row(good), SPEC, str(store))
    assert (status.status, status.reason, status.error) == ("committed", None, None)
    assert status.key is not None
    stored = PatchStore(str(store), SPEC.fingerprint()).slide(status.key)
    assert stored.n_patches == status.n_patches > 10


PERMANENT = {
    "blank": "no-tissue",
    "no-mpp": "missing-mpp",
    "absurd-mpp": "absurd-mpp",
    "coarse": "too-coarse",
    "tiny": "too-small",
    "zeroed": "bad-tiles",
    "cut": "not-a-slide",
    "empty": "empty-file",
    "text": "not-a-slide",
}
TRANSIENT = {"folder": "directory", "none": "missing"}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("kind", "reason"), (PERMANENT | TRANSIENT).items())
def test_bad_slides_are_quarantined_with_their_reason(
    kind: str, reason: str, good: Path, tmp_path: Path, store: Path
) -> None:
    slide = row(spoilt(kind, good, tmp_path))
    status = store_slide(slide, SPEC, str(store))
    assert (status.status, status.key, status.n_patches) == ("quarantined", None, 0)
    assert status.reason is not None
    assert status.reason.startswith(reason + ": ")
    assert status.error is not None
    assert "Traceback" in status.error
    assert not list(store.rglob("slide.json"))
    if kind in PERMANENT:
        patches = PatchStore(str(store), SPEC.fingerprint())
        assert patches.status(slide, storage.source_version(slide.uri)) == status


def test_a_few_bad_tiles_are_counted_and_shown(good: Path, tmp_path: Path, store: Path) -> None:
    spec = SPEC.model_copy(update={"max_bad_tiles": 0.9})
    status = store_slide(row(spoilt("zeroed", good, tmp_path)), spec, str(store))
    assert status.status == "committed"
    assert status.n_bad_tiles > 0
    again = store_slide(row(spoilt("zeroed", good, tmp_path)), spec, str(store))
    assert again == status


def test_a_plain_image_is_a_slide(tmp_path: Path, store: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    Image.fromarray(RGB).save(tmp_path / "plain.jpg")
    spec = SPEC.model_copy(update={"mpp": None})
    assert store_slide(row(tmp_path / "plain.png"), spec, str(store)).status == "committed"
    assert store_slide(row(tmp_path / "plain.jpg"), spec, str(store)).status == "committed"
    assert store_slide(row(tmp_path / "plain.png", mpp=0.5), SPEC, str(store)).status == "committed"


def test_a_slide_replaced_while_it_is_read_is_not_committed(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(good, tmp_path / "moving.tiff"))
    original = tiling.tile_slide

    def replacing(*args: object) -> object:
        os.utime(path, (1, 1))
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tiler, "tile_slide", replacing)
    status = store_slide(row(path), SPEC, str(store))
    assert status.reason is not None
    assert status.reason.startswith("changed: ")
    assert not list(store.rglob("*.json"))
    monkeypatch.undo()
    assert store_slide(row(path), SPEC, str(store)).status == "committed"


def test_content_that_is_stored_is_not_tiled_again(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_slide(row(good), SPEC, str(store))
    twin = Path(shutil.copy(good, tmp_path / "twin.tiff"))
    monkeypatch.delattr(tiler, "tile_slide")
    second = store_slide(row(twin), SPEC, str(store))
    assert (second.slide_id, second.key, second.n_patches) == ("twin", first.key, first.n_patches)


def test_an_unforeseen_failure_costs_one_slide_and_is_not_remembered(
    good: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tiler, "tile_slide", failing)
    status = store_slide(row(good), SPEC, str(store))
    assert status.reason == "crash: ZeroDivisionError"
    assert not list(store.rglob("*.json"))


def test_a_store_that_cannot_be_written_is_no_slides_fault(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        store_slide(row(good), SPEC, str(tmp_path / "file" / "store"))
