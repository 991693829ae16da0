"""Parts of a slide: their borders follow from the plan alone, their index is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import TilingConfig
from pipeline.schema import INDEX, MEASURED, PATCHES
from pipeline.slides.open import open_slide
from pipeline.store import parts
from pipeline.store.parts import join_index, pack, part_count, part_index, part_patches, read_part, unpack
from pipeline.tiling.slide import SlideTiling, tile_slide
from tests.synth import tissue_rgb, write_pyramid, zero_tile

SPEC = TilingConfig(patch_px=32, tissue="none", max_bad_tiles=0.9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 31 x 24 cells; one tile of 240 px is lost."""
    path = write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", tissue_rgb(1013, 787))
    zero_tile(path, 0, 6)
    return path


@pytest.fixture
def tiling(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlideTiling]:
    monkeypatch.setattr(parts, "BATCH_PATCHES", 37)
    monkeypatch.setattr(parts, "MAX_PART_PATCHES", 101)
    with open_slide(path) as reader:
        yield tile_slide(reader, SPEC, 0.5)


@given(st.integers(8, 4096))
def test_a_part_is_bounded_in_pixels(patch_px: int) -> None:
    assert 1 <= part_patches(patch_px) <= 8192
    assert part_patches(patch_px) * patch_px**2 <= 2**26
    assert part_patches(256) == 1024


def test_a_part_is_the_same_whoever_reads_it(tiling: SlideTiling, path: Path) -> None:
    numbers = range(part_count(tiling))
    assert len(numbers) == -(-len(tiling.cells) // 101) > 2
    in_order = [read_part(tiling, number) for number in numbers]
    assert len(tiling.bad_tiles) > 30
    for number in reversed(numbers):
        with open_slide(path) as reader:
            data, part = read_part(tiling.attached(reader), number)
        assert data == in_order[number][0]
        assert part == in_order[number][1]


def test_lost_patches_move_no_border(tiling: SlideTiling) -> None:
    found = [read_part(tiling, number) for number in range(part_count(tiling))]
    origins = tiling.grid.level0_origins(tiling.cells).tolist()
    for number, (data, part) in enumerate(found):
        table = pa.ipc.open_file(data).read_all()
        assert table.schema.equals(PATCHES, check_metadata=True)
        cells = table.column("cell").to_pylist()
        assert [origins[cell] for cell in cells] == [[row["x"], row["y"]] for row in table.to_pylist()]
        lost = [tuple(origins[cell]) for cell in range(number * 101, min(number * 101 + 101, len(origins)))]
        assert part.bad_tiles == tuple(corner for corner in lost if corner not in {tuple(origins[c]) for c in cells})
        assert len(table) == part.patches == len(part.index)
        assert pa.ipc.open_file(data).get_batch(0).num_rows == 37
    index = join_index([part for _, part in found])
    assert index.schema.equals(INDEX)
    assert index.column("row").to_pylist() == list(range(len(tiling.cells) - len(tiling.bad_tiles)))
    assert len(set(index.column("cell").to_pylist())) == len(index)


def test_a_part_of_which_nothing_can_be_read_is_empty(tiling: SlideTiling, path: Path) -> None:
    data, part = read_part(tiling, 0)
    empty = pa.BufferOutputStream()
    with pa.ipc.new_file(empty, PATCHES):
        pass
    assert part_index(bytes(empty.getvalue()), 0).schema.equals(part.index.schema)
    assert len(part_index(bytes(empty.getvalue()), 0)) == 0
    assert len(part_index(data, 0)) == part.patches


def test_a_record_is_the_part(tiling: SlideTiling, path: Path) -> None:
    _, part = read_part(tiling, 1)
    assert unpack(pack(part)) == part
    with open_slide(path) as reader:
        measured = tile_slide(reader, SPEC.model_copy(update={"min_sharpness": 700.0}), 0.5)
        _, part = read_part(measured, 1)
    assert part.index.schema.equals(MEASURED)
    assert 0 < sum(part.blurred or ()) == len(measured.blurred)
    assert unpack(pack(part)) == part
