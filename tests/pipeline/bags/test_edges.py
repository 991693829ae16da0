"""Every patch shows its place, the last column and row too: slides whose px say where they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.streamed import StreamedSlide, plan_root
from pipeline.config.data import TilingConfig
from pipeline.ingest.tiler import begin_slide, store_slide
from pipeline.store.patches import PatchStore, StoredSlide
from tests.oracle import patch_of
from tests.pipeline.tiled import contents, open_plan, row, small_tasks, tile_in_shares
from tests.synth import write_pyramid

WIDTH, HEIGHT, PATCH = 613, 487, 64
CORNER = 4  # px: what is compared at each corner; a mean of so many bears the JPEG's error


def coded(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Red and green rise and fall by 3 a px along x and y, blue rises slowly: no two places are alike."""
    y, x = np.mgrid[0:height, 0:width]
    wave = [20 + 3 * np.abs((axis + 72) % 144 - 72) for axis in (x, y)]
    return np.stack([*wave, 30 + 100 * x / width + 90 * y / height], axis=2).round().astype(np.uint8)


def written(folder: Path, kind: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    rgb = coded(*size)
    if kind == "png":
        Image.fromarray(rgb).save(folder / "a.png")
        return folder / "a.png"
    return write_pyramid(folder / "a.tiff", rgb, tile=int(kind), quality=100, levels=3)


def spec(**fields: object) -> TilingConfig:
    plain = {"patch_px": PATCH, "mpp": 0.5, "tissue": "none", "jpeg_quality": 100, **fields}
    return TilingConfig.model_validate(plain)


def stored(path: Path, tiling: TilingConfig, folder: Path) -> StoredSlide:
    status = store_slide(row(path, 0.5), tiling, str(folder))
    assert status.key is not None, status.error
    return PatchStore(str(folder), tiling.fingerprint()).slide(status.key)


def streamed(path: Path, tiling: TilingConfig, folder: Path) -> StreamedSlide:
    slide = row(path, 0.5)
    status = begin_slide(slide, tiling, plan_root(str(folder)), whole=True, pixels=False)
    plans = PatchStore(plan_root(str(folder)), tiling.fingerprint())
    return open_plan(slide, tiling, plans, status.key)  # type: ignore[union-attr]


def check_places(slide: StoredSlide, path: Path) -> None:
    """Every patch, at its four corners and along its edges, against the whole picture."""
    index, extent = slide.index(), slide.extent
    picture = Image.fromarray(coded(*slide.dimensions))
    payloads = slide.payloads(np.arange(slide.n_patches))
    # less than one px of the level, 3 or 6: of level 1 the corner is rounded, and its px are only near the area's mean
    tolerance = 2.5 if slide.level == 0 else 3.6
    for x, y, payload in zip(index.x.tolist(), index.y.tolist(), payloads, strict=True):
        found = simplejpeg.decode_jpeg(payload).astype(float)
        want = patch_of(picture, (x, y), extent, PATCH).astype(float)
        ends = (slice(0, CORNER), slice(PATCH // 2, PATCH // 2 + CORNER), slice(-CORNER, None))
        for lines in ends:
            for columns in ends:
                difference = found[lines, columns].mean(axis=(0, 1)) - want[lines, columns].mean(axis=(0, 1))
                assert np.abs(difference).max() < tolerance, (path.name, x, y, lines, columns)


def ends(slide: StoredSlide) -> list[float]:
    """Right and lower end of the last patches, level-0 px."""
    index = slide.index()
    return [float(index.x.max()) + slide.extent, float(index.y.max()) + slide.extent]


@pytest.mark.parametrize("edge", ["inside", "pad", "drop"])
@pytest.mark.parametrize("overlap", [0, 23])
@pytest.mark.parametrize(("kind", "mpp"), [("png", 0.5), ("64", 0.5), ("240", 0.8), ("240", 1.0), ("png", 0.7)])
def test_patches_show_their_places(tmp_path: Path, kind: str, mpp: float, overlap: int, edge: str) -> None:
    path, tiling = written(tmp_path, kind), spec(mpp=mpp, overlap_px=overlap, edge=edge)
    slide = stored(path, tiling, tmp_path / "store")
    check_places(slide, path)
    level = 0.5 * WIDTH / (WIDTH // 2)  # px of level 1 do not always divide those of level 0
    match edge:
        case "inside":
            assert ends(slide) == pytest.approx([WIDTH, HEIGHT], abs=2 * level if mpp == 1.0 else 0)
        case "pad":
            assert all(end >= size - 2 for end, size in zip(ends(slide), (WIDTH, HEIGHT), strict=True))
        case _:
            assert all(end <= size + 1 for end, size in zip(ends(slide), (WIDTH, HEIGHT), strict=True))
    positions = slide.positions(np.arange(slide.n_patches))
    columns, rows = positions.max(axis=0) + 1
    want = [[column, line] for line in range(rows) for column in range(columns)]
    assert positions.tolist() == want  # unique, without gaps, row by row


@pytest.mark.parametrize("edge", ["inside", "pad", "drop"])
@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.0])
def test_streamed_patches_are_the_stored_ones(tmp_path: Path, mpp: float, edge: str) -> None:
    path, tiling = written(tmp_path, "64"), spec(mpp=mpp, overlap_px=5, edge=edge)
    one, other = stored(path, tiling, tmp_path / "a"), streamed(path, tiling, tmp_path / "b")
    rows = np.arange(one.n_patches)
    assert other.payloads(rows) == one.payloads(rows)
    chunks = [next(iter(PatchBag([slide], threads=1, augment=None).chunks(len(rows)))) for slide in (one, other)]
    assert chunks[0].positions is not None
    assert chunks[1].positions is not None
    assert np.array_equal(chunks[0].positions, one.positions(rows))
    assert np.array_equal(chunks[1].positions, chunks[0].positions)


@pytest.mark.parametrize("edge", ["inside", "pad"])
def test_shares_of_a_slide_and_a_second_writer_give_the_same_bytes(
    tmp_path: Path, edge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tasks(monkeypatch.setattr)
    path, tiling = written(tmp_path, "64"), spec(edge=edge)
    whole = stored(path, tiling, tmp_path / "a")
    stored(path, tiling, tmp_path / "b")
    status = tile_in_shares(row(path, 0.5), str(tmp_path / "c"), tiling)
    assert status.key == whole.key
    a, b, c = (contents(tmp_path / name / tiling.fingerprint() / whole.key) for name in "abc")
    assert a == b == c


@pytest.mark.parametrize("edge", ["inside", "pad"])
@pytest.mark.parametrize("size", [(41, 29), (41, 130), (200, 29)])
def test_what_is_smaller_than_a_patch_is_padded(tmp_path: Path, size: tuple[int, int], edge: str) -> None:
    path, tiling = written(tmp_path, "png", size), spec(edge=edge)
    slide = stored(path, tiling, tmp_path / "store")
    check_places(slide, path)
    assert slide.n_patches == -(-size[0] // PATCH) * -(-size[1] // PATCH)
    last = simplejpeg.decode_jpeg(slide.payloads([slide.n_patches - 1])[0])
    assert (last[-1, -1] > 250).all()
    dropped = store_slide(replace(row(path, 0.5)), spec(edge="drop"), str(tmp_path / "store"))
    assert str(dropped.reason).startswith("too-small: ")


def test_beyond_the_edge_there_is_background_and_not_what_the_scanner_put_there(tmp_path: Path) -> None:
    """The last tiles of a TIFF are whole: here they go on in the edge's colours, as `write_pyramid` fills them."""
    path, tiling = written(tmp_path, "64"), spec(edge="pad", codec="original")
    slide = stored(path, tiling, tmp_path / "store")
    index, rows = slide.index(), np.arange(slide.n_patches)
    for x, y, payload in zip(index.x.tolist(), index.y.tolist(), slide.payloads(rows), strict=True):
        pixels = simplejpeg.decode_jpeg(payload)
        assert (pixels[:, max(0, WIDTH - x) + 1 :] >= 240).all()
        assert (pixels[max(0, HEIGHT - y) + 1 :] >= 240).all()
    encoded = stored(path, spec(edge="pad", codec="encoded"), tmp_path / "store")
    same = [a == b for a, b in zip(slide.payloads(rows), encoded.payloads(rows), strict=True)]
    inside = (index.x + PATCH <= WIDTH) & (index.y + PATCH <= HEIGHT)
    assert same == (~inside).tolist()  # within, the slide's own bytes
