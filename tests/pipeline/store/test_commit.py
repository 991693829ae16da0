"""Writing a slide: the same bytes from one task or several, the commit last, what is there is kept."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError, StorageError
from pipeline.slides.open import SlideReader, open_slide
from pipeline.storage import files
from pipeline.store import commit, parts
from pipeline.store.commit import PlannedSlide, commit_shares, plan_slide, write_pictures, write_share, write_slide
from pipeline.store.parts import Part, part_count
from pipeline.store.patches import PatchStore
from pipeline.store.rows import slide_key
from pipeline.tiling.guide import Guide
from pipeline.tiling.interchange import Coordinates
from pipeline.tiling.slide import SlideTiling, tile_slide
from tests.pipeline.tiled import contents
from tests.synth import tissue_rgb, write_pyramid, zero_tile

SPEC = TilingConfig(
    patch_px=32, tissue="none", max_bad_tiles=0.2, edge="drop"
)  # 31 x 24 cells, of which a bad tile costs 64
RGB = tissue_rgb(1013, 787)


def nothing() -> None:
    """The slide is unchanged."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PART_PATCHES", 199)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with one bad tile."""
    path = write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", RGB)
    zero_tile(path, 0, 6)
    return path


@pytest.fixture
def reader(path: Path) -> Iterator[SlideReader]:
    with open_slide(path) as reader:
        yield reader


@pytest.fixture
def store(tmp_path: Path) -> PatchStore:
    return PatchStore(str(tmp_path / "store"), SPEC.fingerprint())


def plan(reader: SlideReader, spec: TilingConfig = SPEC, guide: Guide | None = None) -> PlannedSlide:
    return plan_slide("d1", 0.5, reader, tile_slide(reader, spec, 0.5, guide))


def scattered(n: int) -> Guide:
    """Places on no lattice, in no order, as another tool may give them."""
    numbers = np.random.default_rng(0).choice((1013 - 32) * (787 - 32), n, replace=False)
    return Guide(coords=Coordinates(np.stack(np.divmod(numbers, 787 - 32), axis=1), 32.0, 32.0, "clam"))


def share(store: PatchStore, planned: PlannedSlide, numbers: range, path: Path) -> None:
    """What a task on another node does."""
    with open_slide(path) as reader:
        write_share(store, pickle.loads(pickle.dumps(planned.share(numbers))).attached(reader), numbers, nothing)


def test_a_plan_travels_small_and_whole(reader: SlideReader, store: PatchStore, tmp_path: Path) -> None:
    planned = plan(reader)
    data = pickle.dumps(write_pictures(store, planned))
    assert {Path(name).name: found for name, found in contents(tmp_path).items()} == planned.pictures
    assert len(data) < 8000
    twin = pickle.loads(data)
    assert (twin.tiling.cells == planned.tiling.cells).all()
    assert twin.tiling.cells.dtype == planned.tiling.cells.dtype
    assert twin.fingerprint == planned.fingerprint
    assert twin.attached(reader).tiling.bad_tiles == []


def test_a_share_takes_only_its_own_of_imported_patches(reader: SlideReader, store: PatchStore) -> None:
    planned = write_pictures(store, plan(reader, guide=scattered(300_000)))
    parts_of_it = range(100, 103)  # 199 patches each
    whole, data = pickle.dumps(planned), pickle.dumps(planned.share(parts_of_it))
    rest = len(pickle.dumps(write_pictures(store, plan(reader, guide=scattered(199)))))
    assert rest < 9000
    assert len(data) < rest + 3 * 199 * 8
    assert len(whole) < rest + 300_000 * 8 + 1000  # once for each slide, on its way to the driver
    twin, rows = pickle.loads(data), slice(100 * 199, 103 * 199)
    assert twin.fingerprint == planned.fingerprint
    for corners in ("level0_origins", "level_origins", "level0_boxes"):
        there, here = getattr(twin.tiling.grid, corners), getattr(planned.tiling.grid, corners)
        assert (there(twin.tiling.cells[rows]) == here(planned.tiling.cells[rows])).all()


@pytest.mark.parametrize("guide", [None, scattered(744)], ids=["lattice", "imported"])
@pytest.mark.parametrize("cuts", [[0, 1, 4], [0, 2, 3, 4], [0, 4]])
def test_the_bytes_do_not_depend_on_the_shares(
    cuts: list[int], guide: Guide | None, reader: SlideReader, path: Path, store: PatchStore, tmp_path: Path
) -> None:
    whole = PatchStore(str(tmp_path / "whole"), SPEC.fingerprint())
    stored = write_slide(whole, plan(reader, guide=guide), nothing)
    planned = plan(reader, guide=guide)
    assert part_count(planned.tiling) == 4
    for start, stop in reversed(list(pairwise(cuts))):
        assert not store.has(planned.key)
        share(store, planned, range(start, stop), path)
    shared = commit_shares(store, planned)
    assert shared.n_bad_tiles == stored.n_bad_tiles == (64 if guide is None else 63)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_parts_that_are_whole_are_kept(
    reader: SlideReader, path: Path, store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(reader)
    share(store, planned, range(1, 3), path)
    with pytest.raises(StorageError, match=f"unfinished/{planned.key}: a part's record is gone; run again"):
        commit_shares(store, planned)
    read: list[int] = []
    original = parts.read_part

    def noted(tiling: SlideTiling, number: int) -> tuple[bytes, Part]:
        read.append(number)
        return original(tiling, number)

    monkeypatch.setattr(commit, "read_part", noted)
    share(store, planned, range(4), path)
    assert read == [0, 3]
    commit_shares(store, planned)
    assert commit_shares(store, planned).n_patches == 680  # another job's second commit does nothing


def test_parts_of_another_plan_are_not_kept(reader: SlideReader, path: Path, store: PatchStore) -> None:
    other = plan_slide("d1", 0.5, reader, tile_slide(reader, SPEC.model_copy(update={"overlap_px": 1}), 0.5))
    share(store, other, range(2), path)
    planned = plan(reader)
    share(store, planned, range(4), path)
    assert commit_shares(store, planned).n_patches == 680


def test_too_many_bad_tiles_over_all_shares(reader: SlideReader, path: Path, store: PatchStore) -> None:
    planned = plan(reader, SPEC.model_copy(update={"max_bad_tiles": 0.08}))
    for number in range(4):
        share(store, planned, range(number, number + 1), path)  # none of them is over the budget
    with pytest.raises(
        SlideError, match="64 of 744 patches cannot be decoded, over tiling.max_bad_tiles=0.08"
    ) as found:
        commit_shares(store, planned)
    assert found.value.reason == "bad-tiles"
    assert not store.has(planned.key)


@pytest.mark.parametrize("write", [write_slide, lambda *a: write_share(a[0], a[1], range(4), a[2])])
def test_a_slide_that_changed_is_neither_committed_nor_recorded(
    write: Callable[..., object], reader: SlideReader, store: PatchStore, tmp_path: Path
) -> None:
    def changed() -> None:
        raise SlideError("changed", "replaced")

    with pytest.raises(SlideError, match="replaced"):
        write(store, plan(reader), changed)
    assert not [name for name in contents(tmp_path / "store") if not name.endswith(".arrow")]


def test_record_of_the_commit(reader: SlideReader, store: PatchStore) -> None:
    stored = write_slide(store, plan(reader), nothing)
    facts = json.loads((Path(stored.uri) / "slide.json").read_text())
    assert facts["key"] == stored.key == slide_key("d1", 0.5)
    assert facts["rejects"]["bad-tile"] == 64
    assert len(facts["bad_tiles"]) == facts["n_bad_tiles"] == stored.n_bad_tiles == 64
    assert [part["patches"] for part in facts["parts"]] == [199, 151, 183, 147]
    for entry in [*facts["parts"], facts["index"], facts["thumbnail"]]:
        data = (Path(stored.uri) / entry["name"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["bytes"])
    assert "max_bad_slides" not in facts["spec"]


def test_parts_are_plain_arrow_files_and_the_index_finds_each_patch(reader: SlideReader, store: PatchStore) -> None:
    stored = write_slide(store, plan(reader), nothing)
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(Path(stored.uri).glob("part-*.arrow"))]
    table = pa.concat_tables(tables)
    assert table.column("image").to_pylist() == stored.payloads(range(stored.n_patches))
    assert table.column("x").to_pylist() == stored.index().x.tolist()


def test_the_commit_is_written_last(reader: SlideReader, store: PatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = files.write_bytes

    def noted(uri: str, data: bytes) -> None:
        written.append(uri.rpartition("/")[2])
        original(uri, data)

    monkeypatch.setattr(files, "write_bytes", noted)
    write_slide(store, plan(reader), nothing)
    assert [name[:10] for name in written[:5]] == [*(f"part-0000{i}" for i in range(4)), "index.parq"]
    assert written.index("slide.json") == len(written) - 1


def test_a_slide_that_fails_midway_is_not_there(reader: SlideReader, store: PatchStore, tmp_path: Path) -> None:
    planned = plan(reader, SPEC.model_copy(update={"max_bad_tiles": 0.06}))
    with pytest.raises(SlideError, match="cannot be decoded"):
        write_slide(store, planned, nothing)
    assert [name.rpartition("/")[2][:11] for name in contents(tmp_path / "store")] == ["part-00000-"]
    assert not store.has(planned.key)
    with pytest.raises(StorageError, match="run the tile stage"):
        store.slide(planned.key)
