"""What a tile worker does: every slide ends in a status, and a killed or repeated worker changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import StorageError
from pipeline.ingest import source
from pipeline.ingest.source import version_of
from pipeline.ingest.tiler import LargeSlide, begin_slide, finish_slide, store_share, store_slide
from pipeline.slides.identity import slide_digest
from pipeline.storage import files
from pipeline.store import commit
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.verify import verify_store
from pipeline.tiling import slide as tiling
from tests.faults import faulty_s3
from tests.pipeline.tiled import RGB, SPEC, row, sampled_digests, small_tasks, spoilt, tile_in_shares
from tests.s3 import S3Server
from tests.synth import tissue_rgb, write_pyramid, zero_tile


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
    (found,) = PatchStore(str(store), SPEC.fingerprint()).view.sources.to_pylist()
    assert (found["uri"], found["key"], found["left"]) == (str(good), status.key, None)


PERMANENT = {
    "blank": "no-tissue",
    "no-mpp": "missing-mpp",
    "absurd-mpp": "absurd-mpp",
    "coarse": "too-coarse",
    "tiny": "too-small",
    "zeroed": "bad-tiles",
    "cut": "truncated",
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
        assert patches.status(slide, files.source_version(slide.uri)) == status


def test_a_few_bad_tiles_are_counted_and_shown(good: Path, tmp_path: Path, store: Path) -> None:
    spec = SPEC.model_copy(update={"max_bad_tiles": 0.9})
    status = store_slide(row(spoilt("zeroed", good, tmp_path)), spec, str(store))
    assert status.status == "committed"
    assert status.n_bad_tiles > 0
    again = store_slide(row(spoilt("zeroed", good, tmp_path)), spec, str(store))
    assert again == status


@pytest.mark.parametrize("lost", [[0], [2], [0, 1, 2, 3, 4, 5]])
def test_a_bad_tile_of_a_level_that_no_patch_is_cut_from_costs_nothing(
    lost: list[int], tmp_path: Path, store: Path
) -> None:
    """Level 1, from which the tissue is found, has 3 x 2 tiles: lost are tissue, glass, all of them."""
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1031, 787), levels=2)
    sound = store_slide(row(path), SPEC, str(store))
    for tile in lost:
        zero_tile(path, 1, tile)
    status = store_slide(row(path), SPEC, str(store))
    assert (status.status, status.n_patches, status.n_bad_tiles) == ("committed", sound.n_patches, 0)
    assert sound.n_patches > 50


def test_a_plain_image_is_a_slide(tmp_path: Path, store: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    Image.fromarray(RGB).save(tmp_path / "plain.jpg")
    spec = SPEC.model_copy(update={"mpp": None})
    assert store_slide(row(tmp_path / "plain.png"), spec, str(store)).status == "committed"
    assert store_slide(row(tmp_path / "plain.jpg"), spec, str(store)).status == "committed"
    assert store_slide(row(tmp_path / "plain.png", mpp=0.5), SPEC, str(store)).status == "committed"
    Image.fromarray(RGB).save(tmp_path / "plain.tiff", dpi=(50_800, 50_800))
    without = store_slide(row(tmp_path / "plain.tiff"), SPEC, str(store)).reason
    assert str(without).startswith("missing-mpp: the file states no microns per px (of a plain image its resolution")


def test_a_slide_replaced_while_it_is_read_is_not_committed(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(good, tmp_path / "moving.tiff"))
    original = tiling.tile_slide

    def replacing(*args: object) -> object:
        os.utime(path, (1, 1))
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "tile_slide", replacing)
    status = store_slide(row(path), SPEC, str(store))
    assert status.reason is not None
    assert status.reason.startswith("changed: ")
    assert not list(store.rglob("*.json"))
    monkeypatch.undo()
    assert store_slide(row(path), SPEC, str(store)).status == "committed"


def test_a_slide_on_s3_that_is_replaced_between_two_parts_is_not_committed(
    server: S3Server, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, by ranges: the parts before are the old file's, and those after would be the new one's."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    sampled_digests(monkeypatch.setattr)
    small_tasks(monkeypatch.setattr)
    path, slide = server.folder / "slides" / "moving.tiff", row("s3://slides/moving.tiff")
    write_pyramid(path, RGB, levels=2)
    other = write_pyramid(server.folder / "slides" / "other.tiff", tissue_rgb(613, 487, seed=9), levels=2)
    original = files.write_bytes

    def replacing(uri: str, data: bytes) -> None:
        original(uri, data)
        if "/part-00001-" in uri:
            shutil.copy(other, path)

    monkeypatch.setattr(files, "write_bytes", replacing)
    status = tile_in_shares(slide, str(store))
    assert (status.reason or "").startswith("changed: s3://slides/moving.tiff: ")
    assert not list(store.rglob("slide.json"))
    monkeypatch.setattr(files, "write_bytes", original)
    again, new = (tile_in_shares(one, str(store)) for one in (slide, row("s3://slides/other.tiff")))
    assert (again.status, again.key) == ("committed", new.key)


@pytest.mark.slow
def test_a_slide_of_2_32_px_is_tiled(tmp_path: Path, store: Path) -> None:
    """All but the last of its tiles are declared empty, so it is 1 MB."""
    edge, tile = 65_536, 4096
    noise = np.random.default_rng(0).normal(0, 14, (tile, tile, 1))
    jpeg = simplejpeg.encode_jpeg(np.clip(np.array([200, 120, 170]) + noise, 0, 255).astype(np.uint8))
    options: dict[str, Any] = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}
    options |= {"resolution": (20_000, 20_000), "resolutionunit": 3, "dtype": np.uint8}
    with tifffile.TiffWriter(tmp_path / "a.tiff", bigtiff=True) as tiff:
        tiff.write(iter([b""] * 255 + [jpeg]), shape=(edge, edge, 3), tile=(tile, tile), **options)
    spec = TilingConfig(artefacts="keep")
    status = store_slide(row(tmp_path / "a.tiff"), spec, str(store))
    assert (status.n_patches, status.n_bad_tiles) == (16 * 16, 0), status.reason
    stored = PatchStore(str(store), spec.fingerprint()).slide(str(status.key))
    index = stored.index()
    assert (index.x.min(), index.y.min()) == (edge - tile, edge - tile)
    assert (index.x.max(), index.y.max()) == (edge - 256, edge - 256)
    (last,) = stored.payloads([255])
    whole = simplejpeg.decode_jpeg(jpeg)[-256:, -256:].astype(int)
    assert np.abs(simplejpeg.decode_jpeg(last).astype(int) - whole).mean() < 3


def test_content_that_is_stored_is_not_tiled_again(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_slide(row(good), SPEC, str(store))
    twin = Path(shutil.copy(good, tmp_path / "twin.tiff"))
    monkeypatch.delattr(source, "tile_slide")
    second = store_slide(row(twin), SPEC, str(store))
    assert (second.slide_id, second.key, second.n_patches) == ("twin", first.key, first.n_patches)


def test_an_unforeseen_failure_costs_one_slide_and_is_not_remembered(
    good: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(source, "tile_slide", failing)
    status = store_slide(row(good), SPEC, str(store))
    assert status.reason == "crash: ZeroDivisionError"
    assert not list(store.rglob("*.json"))


def test_a_store_that_cannot_be_written_is_no_slides_fault(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        store_slide(row(good), SPEC, str(tmp_path / "file" / "store"))


LENIENT = SPEC.model_copy(update={"max_bad_tiles": 0.9})


def damaged(good: Path, folder: Path, *tiles: int) -> Path:
    """A copy with some level-0 tiles that cannot be decoded, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    path = Path(shutil.copy(good, folder / "slide.tiff"))
    for tile in tiles:
        zero_tile(path, 0, tile)
    return path


@pytest.mark.parametrize("store_it", [store_slide, lambda slide, spec, store: tile_in_shares(slide, store, spec)])
def test_a_mended_copy_of_a_large_slide_gets_its_patches_back(
    store_it: Callable[..., SlideStatus], good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the samples of its digest see: half mended, then whole; each copy is stored as what it is."""
    spec = LENIENT.model_copy(update={"tissue": "none"})  # by tissue, unread places would be patches too
    sampled_digests(monkeypatch.setattr)
    small_tasks(monkeypatch.setattr)
    paths = [damaged(good, tmp_path / str(len(tiles)), *tiles) for tiles in ((1, 4), (4,), ())]
    assert len({slide_digest(str(path)) for path in paths}) == 1
    worst, better, whole = (store_it(row(path), spec, str(store)) for path in paths)
    assert worst.n_bad_tiles > better.n_bad_tiles > whole.n_bad_tiles == 0
    assert whole.n_patches == better.n_patches + better.n_bad_tiles == worst.n_patches + worst.n_bad_tiles
    assert len({worst.key, better.key, whole.key}) == 3
    fresh = store_it(row(paths[2]), spec, str(tmp_path / "fresh"))
    payloads = [
        PatchStore(str(root), spec.fingerprint()).slide(str(key)).payloads(range(whole.n_patches))
        for root, key in ((store, whole.key), (tmp_path / "fresh", fresh.key))
    ]
    assert payloads[0] == payloads[1]
    assert verify_store(str(store), 1, lambda done, total: None).damage == []
    monkeypatch.setattr(commit, "read_part", None)  # nothing is tiled again, and what each became is remembered
    for path, status in zip(paths, (worst, better, whole), strict=True):
        os.utime(path, (1, 1))
        assert store_it(row(path), spec, str(store)) == status
    slides = [row(path) for path in paths]
    versions = [version_of(slide, spec) for slide in slides]
    assert list(PatchStore(str(store), spec.fingerprint()).statuses(slides, versions)) == [worst, better, whole]


def test_a_worse_copy_of_a_large_slide_keeps_the_stored_patches(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_digests(monkeypatch.setattr)
    first = store_slide(row(good), LENIENT, str(store))
    monkeypatch.delattr(source, "tile_slide")
    assert store_slide(row(damaged(good, tmp_path / "x", 1)), LENIENT, str(store)).key == first.key


def test_a_whole_copy_that_ends_after_a_damaged_one_is_not_taken_for_it(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one cohort, tiled at the same time: the next run stores the whole one."""
    sampled_digests(monkeypatch.setattr)
    small_tasks(monkeypatch.setattr)
    bad = damaged(good, tmp_path / "x", 1)
    begun = begin_slide(row(good), LENIENT, str(store), whole=False)
    assert isinstance(begun, LargeSlide)
    first = tile_in_shares(row(bad), str(store), LENIENT)
    count = part_count(begun.planned.tiling)
    assert store_share(begun, range(count), LENIENT, str(store)) is None
    late = finish_slide(begun, LENIENT, str(store))
    assert (late.reason or "").startswith("changed: ")
    assert f"lost {first.n_bad_tiles} patches" in str(late.reason)
    assert verify_store(str(store), 1, lambda done, total: None).damage == []
    assert tile_in_shares(row(good), str(store), LENIENT).n_bad_tiles == 0
    assert tile_in_shares(row(bad), str(store), LENIENT) == first


@pytest.fixture
def counted(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """Bytes of an object that have travelled so far."""
    with faulty_s3(server.endpoint) as proxy:
        for name, value in {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield lambda name: sum(length for path, length in proxy.sent if path == f"/slides/{name}")


@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_a_small_slide_on_s3_travels_once(
    kind: str, server: S3Server, counted: Callable[[str], int], tmp_path: Path
) -> None:
    """Its digest needs all bytes, it is read from them, and nothing is asked for again."""
    path, spec = server.folder / "slides" / f"small.{kind}", SPEC.model_copy(update={"cache": str(tmp_path / "cache")})
    if kind == "tiff":
        write_pyramid(path, RGB)
    else:
        Image.fromarray(RGB).save(path)
    status = store_slide(row(f"s3://slides/{path.name}", mpp=0.5), spec, str(tmp_path / "store"))
    assert counted(path.name) == path.stat().st_size
    assert replace(status, uri=str(path)) == store_slide(row(path, mpp=0.5), spec, str(tmp_path / "local"))
    assert status.status == "committed"
    assert not list((tmp_path / "cache").glob("*/files/*"))


def test_the_files_of_a_slide_on_s3_travel_once(
    server: S3Server, counted: Callable[[str], int], tmp_path: Path
) -> None:
    """Identified by the copy that is opened."""
    folder = server.folder / "slides"
    (folder / "a").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat"):
        (folder / name).write_bytes(name.encode() * 1000)
    spec = SPEC.model_copy(update={"cache": str(tmp_path / "cache")})
    status = store_slide(row("s3://slides/a.mrxs"), spec, str(tmp_path / "store"))
    assert (status.reason or "").startswith("unopenable: a.mrxs: ")  # OpenSlide had it
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat"):
        assert counted(name) == len(name) * 1000
