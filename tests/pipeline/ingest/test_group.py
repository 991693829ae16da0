"""Slides of one task: packed and committed together, each content once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.ingest.group import Group
from pipeline.ingest.tiler import ReadSlide, read_slide
from pipeline.storage import files
from pipeline.store.packs import PACKS
from pipeline.store.patches import PatchStore, SlideStatus
from tests.faults import faulty_s3
from tests.pipeline.tiled import RGB, SPEC, row, spoilt
from tests.s3 import serve_s3
from tests.synth import tissue_rgb, write_pyramid

NONE = np.array([], "S32")


def take(group: Group, number: int, slide: CohortSlide, store: Path) -> None:
    found, rows = read_slide(slide, Path(slide.uri).stat().st_size, SPEC, str(store))
    if isinstance(found, ReadSlide):
        group.add(number, found)
    else:
        assert isinstance(found, SlideStatus)
        group.add_status(number, found, rows)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[CohortSlide]:
    """Two slides, a copy of the first, and one that is blank."""
    folder = tmp_path_factory.mktemp("slides")
    first = write_pyramid(folder / "a.tiff", RGB, levels=2)
    second = write_pyramid(folder / "b.tiff", tissue_rgb(331, 277, seed=3), levels=1)
    twin = Path(shutil.copy(first, folder / "twin.tiff"))
    return [row(first), row(second), row(twin), row(spoilt("blank", first, folder))]


def test_a_group_is_two_files(slides: list[CohortSlide], tmp_path: Path) -> None:
    patches = PatchStore(str(tmp_path), SPEC.fingerprint())
    group = Group(patches, NONE)
    for number, slide in enumerate(slides):
        take(group, number, slide, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing before the commit
    done = list(group.commit())
    assert [number for number, _ in done] == [0, 1, 2, 3]
    assert [status.status for _, status in done] == ["committed", "committed", "committed", "quarantined"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    first, second, twin, _ = (status.key for _, status in done)
    assert first == twin != second
    assert first is not None
    assert second is not None
    for key in (first, second):
        stored = patches.slide(key)
        assert len(stored.payloads(np.arange(stored.n_patches))) == stored.n_patches > 0
    versions = [read_slide(slide, 1, SPEC, str(tmp_path))[0] for slide in slides[:3]]
    known = patches.statuses(slides[:3], [found.version for found in versions if isinstance(found, ReadSlide)])
    assert list(known) == [status for _, status in done[:3]]
    assert list(group.commit()) == []


def test_a_small_slide_on_s3_is_one_request(
    slides: list[CohortSlide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a group two more: its pack, and its file of the catalogue."""
    with serve_s3(tmp_path / "s3") as server, faulty_s3(server.endpoint) as proxy:
        for name, value in {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        bucket, spec = server.bucket("slides"), SPEC.model_copy(update={"mpp": None})
        Image.fromarray(RGB).save(tmp_path / "plain.png")
        paths = [*(Path(slide.uri) for slide in slides[:2]), tmp_path / "plain.png"]
        for path in paths:
            files.write_bytes(f"{bucket}/{path.name}", path.read_bytes())
        proxy.seen.clear()
        group = Group(PatchStore(f"{bucket}/store", spec.fingerprint()), NONE)
        for number, path in enumerate(paths):
            found, _ = read_slide(row(f"{bucket}/{path.name}"), path.stat().st_size, spec, f"{bucket}/store")
            assert isinstance(found, ReadSlide)
            group.add(number, found)
        assert [status.status for _, status in group.commit()] == ["committed"] * 3
        assert [method for method, *_ in proxy.seen] == ["GET"] * 3 + ["PUT"] * 2


def test_what_is_known_is_not_packed_again(slides: list[CohortSlide], tmp_path: Path) -> None:
    patches = PatchStore(str(tmp_path), SPEC.fingerprint())
    group = Group(patches, NONE)
    take(group, 0, slides[0], tmp_path)
    ((_, status),) = group.commit()
    again = Group(patches, np.sort(np.array([status.key, "f" * 32], "S32")))
    take(again, 0, slides[2], tmp_path)
    ((_, twin),) = again.commit()
    assert twin.key == status.key
    assert len(list(tmp_path.glob(f"*/{PACKS}/*"))) == 1
    assert patches.has(str(status.key))


def test_two_writers_of_one_slide(slides: list[CohortSlide], tmp_path: Path) -> None:
    """Both packs stay, and one slide is seen, whichever came first."""
    groups = [Group(PatchStore(str(tmp_path), SPEC.fingerprint()), NONE) for _ in range(2)]
    take(groups[0], 0, slides[0], tmp_path)
    take(groups[1], 0, slides[1], tmp_path)
    take(groups[1], 1, slides[0], tmp_path)
    statuses = [status for group in groups for _, status in group.commit()]
    patches = PatchStore(str(tmp_path), SPEC.fingerprint())
    assert len(list(tmp_path.glob(f"*/{PACKS}/*"))) == 2
    assert len(patches.view.slides) == 2
    stored = patches.slide(str(statuses[0].key))
    assert len(stored.payloads(np.arange(stored.n_patches))) == stored.n_patches


def test_a_slide_is_erased(slides: list[CohortSlide], tmp_path: Path) -> None:
    patches = PatchStore(str(tmp_path), SPEC.fingerprint())
    for order in (1, -1):  # both are in two packs
        group = Group(patches, NONE)
        for number, slide in enumerate(slides[:2][::order]):
            take(group, number, slide, tmp_path)
        kept, erased = (str(status.key) for _, status in group.commit())
    assert len(list(tmp_path.glob(f"*/{PACKS}/*"))) == 2
    stored = patches.slide(erased)
    secret = stored.payloads(np.array([1]))[0]
    before = patches.slide(kept).payloads(np.array([0, 2]))
    patches.take_out([erased])
    packs = [path.read_bytes() for path in tmp_path.glob(f"*/{PACKS}/*")]
    assert packs
    assert not any(secret in data for data in packs)
    assert not patches.has(erased)
    assert patches.slide(kept).payloads(np.array([0, 2])) == before
    patches.take_out([erased])  # as after a kill
    assert patches.slide(kept).payloads(np.array([0, 2])) == before
