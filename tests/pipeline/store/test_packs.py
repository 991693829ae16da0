"""Packs: every patch, index and picture of every slide is found again, by exactly its bytes, and by the bytes alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedError
from pipeline.schema import PATCHES
from pipeline.storage import files
from pipeline.store.packs import Pack, Place, SmallSlide, is_pack, read_index, read_pack, without, write_pack
from pipeline.store.patches import StoredSlide


def small(name: str, lengths: list[int], *, planned: bool = False) -> SmallSlide:
    """A slide of patches of these lengths, all different."""
    n = len(lengths)
    images = [hashlib.sha512(f"{name}-{row}".encode()).digest()[:1] * length for row, length in enumerate(lengths)]
    cells = np.arange(n) * 3 + 1  # with gaps, as where patches are lost
    columns = [cells, cells * 64, cells * 37 + 5, np.full(n, 2)]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, PATCHES, strict=False)]
    patches = pa.record_batch([*arrays, pa.array(images, pa.large_binary())], schema=PATCHES)
    facts = {"key": name, "n_patches": n, "level": 2, "series": None, "mpp": 0.25, "vendor": "ä"}
    corners = np.stack([cells * 32, cells * 18], axis=1).astype(np.int32) if planned else None
    return SmallSlide(facts, patches, f"overview of {name}".encode(), f"mask {name}".encode(), corners)


def stored(folder: Path, pack: Pack, slide: SmallSlide) -> StoredSlide:
    """The slide, read from the pack's file."""
    uri = str(folder / pack.name)
    files.write_bytes(uri, pack.data)
    return StoredSlide(
        uri, slide.key, len(slide.patches), 0, 64, 2, 4.0, 256.0, 0.25, (999, 777), 8.0, False, pack.places[slide.key]
    )


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=300), min_size=1, max_size=6))
def test_every_byte_is_where_its_place_says(sizes: list[list[int]]) -> None:
    slides = [small(f"s{number}", lengths) for number, lengths in enumerate(sizes)]
    pack = write_pack(slides)
    for slide in slides:
        place = pack.places[slide.key]
        images = slide.patches.column("image").to_pylist()
        assert pack.data[place.first :].startswith(b"".join(images))
        index = np.frombuffer(pack.data, "<i4", 4 * len(images), place.index).reshape(-1, 4)
        assert index[:, 3].tolist() == [len(image) for image in images]
        assert index[:, :3].T.tolist() == [slide.patches.column(name).to_pylist() for name in ("cell", "x", "y")]
        assert pack.data[place.overview :][: place.overview_bytes] == slide.overview
        assert pack.data[place.mask :][: place.mask_bytes] == slide.mask
        assert Place.of(place.json()) == place


def test_a_pack_tells_its_slides_by_itself(tmp_path: Path) -> None:
    slides = [small("a", [11, 7, 0, 5]), small("b", [3] * 300), small("c", [1], planned=True)]
    pack = write_pack(slides)
    uri = str(tmp_path / pack.name)
    files.write_bytes(uri, pack.data)
    again, found = read_pack(uri)
    assert again == pack
    assert [(one.facts, one.patches, one.overview, one.mask) for one in found] == [
        (one.facts, one.patches, one.overview, one.mask) for one in slides
    ]
    assert [None if one.corners is None else one.corners.tolist() for one in found] == [None, None, [[32, 18]]]
    assert write_pack(found).data == pack.data


def test_the_bytes_follow_from_the_slides() -> None:
    first, second = small("a", [11, 7]), small("b", [3])
    assert write_pack([first, second]).data == write_pack([small("a", [11, 7]), small("b", [3])]).data
    assert write_pack([first, second]).name != write_pack([second, first]).name
    assert is_pack(write_pack([first]).name)
    assert not is_pack("part-00000.arrow")


def test_rows_are_read_by_exactly_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = [small("a", [11, 7, 13, 5, 3]), small("b", [2, 9, 4])]
    pack = write_pack(slides)
    read: list[tuple[int, int]] = []
    exact = files.read_ranges

    def counted(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        read.extend(ranges)
        return exact(uri, ranges)

    monkeypatch.setattr(files, "read_ranges", counted)
    a, b = (stored(tmp_path, pack, slide) for slide in slides)
    images = slides[0].patches.column("image").to_pylist()
    assert a.payloads(np.array([4, 0, 1])) == [images[4], images[0], images[1]]
    assert [length for _, length in read] == [5 * 4 * 4, 18, 3]  # the index, rows 0 and 1, row 4
    read.clear()
    assert a.payloads(np.arange(5)) == images
    assert [length for _, length in read] == [39]  # the index is held
    assert b.payloads(np.array([1])) == [slides[1].patches.column("image")[1].as_py()]
    assert b.index().x.tolist() == [64, 256, 448]
    table = b.index_table()
    assert table.column("cell").to_pylist() == [1, 4, 7]
    assert table.column("offset").to_pylist() == b.index().offset.tolist()


def test_a_plan_has_corners_and_no_patches(tmp_path: Path) -> None:
    slide = small("a", [0, 0], planned=True)
    plan = stored(tmp_path, write_pack([slide]), slide)
    assert plan.origins().tolist() == [[32, 18], [128, 72]]
    assert plan.index().part.tolist() == [-1, -1]
    assert plan.mask() == b"mask a"


def test_a_slide_is_taken_out(tmp_path: Path) -> None:
    slides = [small("a", [11, 7]), small("b", [3]), small("c", [4, 4])]
    pack = without(slides, {"b"})
    assert pack is not None
    assert list(pack.places) == ["a", "c"]
    assert pack == write_pack([slides[0], slides[2]])
    assert slides[1].overview not in pack.data
    assert without(slides, {"a", "b", "c"}) is None


def test_changed_bytes_are_named(tmp_path: Path) -> None:
    pack = write_pack([small("a", [11, 7])])
    uri = str(tmp_path / pack.name)
    files.write_bytes(uri, pack.data[:-1] + b"!")
    with pytest.raises(DamagedError, match=pack.name):
        read_pack(uri)
    files.write_bytes(uri, pack.data[:100])
    with pytest.raises(DamagedError, match="it ends at byte"):
        read_index(uri, pack.places["a"], 2)
