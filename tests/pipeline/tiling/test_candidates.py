"""Which places become patches, and the reason where none does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Level, Overview
from pipeline.tiling.candidates import EXAMPLES, Candidates, find_candidates
from pipeline.tiling.guide import Guide
from pipeline.tiling.interchange import Coordinates
from pipeline.tiling.masks import ExternalMask
from tests.oracle import uncovered
from tests.pipeline.tiling.test_masks import geojson, polygon

WIDTH, HEIGHT = 4001, 3203  # level-0 px; the overview shows 8 of them in one
LEVELS = (Level(WIDTH, HEIGHT, 1.0), Level(WIDTH // 4, HEIGHT // 4, WIDTH / (WIDTH // 4)))

Area = tuple[str, tuple[int, int, int, int]]


def overview(*areas: Area) -> Overview:
    """Glass with what is named at left, top, right, bottom (level-0 px)."""
    generator = np.random.default_rng(3)
    rgb = np.clip(generator.normal(241, 1, (401, 501, 3)), 0, 255)
    for kind, (left, top, right, bottom) in areas:
        box = (slice(top // 8, bottom // 8), slice(left // 8, right // 8))
        colour, noise = ((200, 120, 170), 10) if kind == "tissue" else ((50, 90, 180), 0.3)
        rgb[box] = np.array(colour) + generator.normal(0, noise, (*rgb[box].shape[:2], 1))
    return Overview(np.clip(np.rint(rgb), 0, 255).astype(np.uint8), np.zeros(rgb.shape[:2], bool), WIDTH / 501)


def spec(**fields: object) -> TilingConfig:
    return TilingConfig.model_validate({"patch_px": 64, "mpp": 0.5, **fields})


def found(view: Overview, guide: Guide | None = None, **fields: object) -> Candidates:
    return find_candidates(view, LEVELS, spec(**fields), 0.5, guide or Guide())


def considered(places: Candidates) -> int:
    """Places before any was left out."""
    return len(places.cells) + sum(places.rejects.values())


@pytest.mark.parametrize("scale", [3.7, 7.3, 31.999])
def test_patches_that_are_all_tissue_have_enough_of_it(scale: float) -> None:
    data = geojson(polygon([[0, 0], [90_000, 0], [90_000, 90_000], [0, 90_000], [0, 0]]))
    shape = (403, 501)
    view = Overview(np.full((*shape, 3), 240, np.uint8), np.zeros(shape, bool), scale)
    levels = (Level(int(501 * scale), int(403 * scale), 1.0),)
    guide = Guide(ExternalMask("all.geojson", data))
    result = find_candidates(view, levels, spec(min_tissue=1.0), 0.5, guide)
    assert result.rejects == {"tissue": 0}


def test_every_place_is_a_patch_or_has_a_reason() -> None:
    view = overview(("tissue", (640, 640, 1920, 1600)), ("pen", (2560, 640, 3840, 1280)))
    result = found(view)
    assert considered(result) == 63 * 51
    corners = result.grid.level0_origins(result.cells)
    assert corners.min(axis=0).tolist() == [640, 640]
    assert corners.max(axis=0).tolist() == [1920 - 64, 1600 - 64]
    assert result.rejects["artefact"] == pytest.approx(20 * 10, abs=35)
    assert considered(found(view, artefacts="keep")) == considered(result)
    assert len(found(view, artefacts="keep").cells) == len(result.cells) + result.rejects["artefact"]


def test_examples_are_artefacts_and_what_missed_the_least() -> None:
    result = found(overview(("tissue", (640, 640, 1930, 1600)), ("pen", (2560, 640, 3840, 1280))))
    assert len(result.examples) == EXAMPLES
    assert [one.reason for one in result.examples].count("artefact") == EXAMPLES // 2
    (best, *rest) = [one.tissue for one in result.examples if one.reason == "tissue"]
    assert 0 < best < 0.25
    assert rest == sorted(rest, reverse=True)
    kept = {tuple(cell) for cell in result.cells.tolist()}
    assert not kept & {(one.column, one.row) for one in result.examples}


def test_half_a_percent_of_tissue_on_a_blank_slide_is_found() -> None:
    pieces = [(800, 160, 960, 320), (3200, 2400, 3360, 2480), (1600, 2880, 1760, 2960), (3600, 320, 3680, 400)]
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in pieces) / (WIDTH * HEIGHT)
    assert 0.004 < area < 0.006
    result = found(overview(*(("tissue", piece) for piece in pieces)))
    corners = result.grid.level0_origins(result.cells)
    for left, top, right, bottom in pieces:
        near = (corners > [left - 64, top - 64]) & (corners < [right, bottom])
        assert near.all(axis=1).any(), (left, top)
    assert len(result.cells) < 0.02 * considered(result)


@pytest.mark.parametrize(
    ("areas", "fields", "reason"),
    [
        ([], {}, "no-tissue"),
        ([("pen", (640, 640, 1920, 1600))], {}, "artefact"),
        ([("tissue", (640, 640, 680, 680))], {"patch_px": 512}, "too-little-tissue"),
        ([("tissue", (640, 640, 1920, 1600))], {"patch_px": 3300, "edge": "drop"}, "too-small"),
    ],
)
def test_nothing_has_its_reason(areas: list[Area], fields: dict[str, object], reason: str) -> None:
    with pytest.raises(SlideError) as caught:
        find_candidates(overview(*areas), LEVELS, spec(**fields), 0.5, Guide())
    assert caught.value.reason == reason


def test_tissue_that_lies_beyond_the_last_patches_is_not_called_small() -> None:
    view = overview(("tissue", (3700, 640, 3990, 1600)))
    with pytest.raises(SlideError, match=r": 100% of the tissue lies beyond the last column and row; set") as caught:
        found(view, patch_px=512, edge="drop")
    assert caught.value.reason == "too-little-tissue"
    assert len(found(view, patch_px=512, edge="inside").cells) > 0


def test_pen_marks_with_a_speck_beside_them_are_artefacts() -> None:
    with pytest.raises(SlideError, match=r"no texture.*; of what else is coloured the best has [1-9]") as caught:
        found(overview(("pen", (640, 640, 1920, 1600)), ("tissue", (3200, 2400, 3232, 2424))))
    assert caught.value.reason == "artefact"


def test_a_mask_that_names_no_tissue() -> None:
    sink = io.BytesIO()
    Image.fromarray(np.zeros((320, 400), np.uint8)).save(sink, format="PNG")
    guide = Guide(mask=ExternalMask("masks/a.png", sink.getvalue()))
    with pytest.raises(SlideError, match=r"masks/a\.png: names no tissue") as caught:
        found(overview(("tissue", (640, 640, 1920, 1600))), guide)
    assert caught.value.reason == "mask"
    ring = [[640, 640], [664, 640], [664, 664], [640, 664], [640, 640]]
    guide = Guide(mask=ExternalMask("a.geojson", geojson(polygon(ring))))
    with pytest.raises(SlideError, match="smaller than a patch") as caught:
        found(overview(("tissue", (640, 640, 1920, 1600))), guide)
    assert caught.value.reason == "too-little-tissue"


def test_a_mask_is_taken_as_it_is() -> None:
    ring = [[2560, 640], [3840, 640], [3840, 1280], [2560, 1280], [2560, 640]]
    guide = Guide(mask=ExternalMask("a.geojson", geojson(polygon(ring))))
    view = overview(("tissue", (640, 640, 1920, 1600)), ("pen", (2560, 640, 3840, 1280)))
    result = found(view, guide, min_tissue=0.9)
    corners = result.grid.level0_origins(result.cells)
    assert corners.min(axis=0).tolist() == [2560, 640]
    assert corners.max(axis=0).tolist() == [3840 - 64, 1280 - 64]


def coordinates(corners: list[list[int]], extent: float = 64) -> Guide:
    return Guide(coords=Coordinates(np.array(corners), extent, extent, "clam"))


def test_imported_patches_stand_where_the_file_says_in_its_order() -> None:
    result = found(overview(), coordinates([[700, 33], [13, 7], [700, 33], [-1, 5], [WIDTH - 63, 5], [WIDTH - 64, 9]]))
    assert result.grid.level0_origins(result.cells).tolist() == [[700, 33], [13, 7], [WIDTH - 64, 9]]
    assert result.grid.level_origins(result.cells[1:2]).tolist() == [[13, 7]]
    assert result.rejects == {"outside": 2, "twice": 1}
    assert considered(result) == 6


def test_imported_patches_of_another_level() -> None:
    result = found(overview(), coordinates([[257, 401]], 256.0), mpp=2.0)
    assert result.grid.level == 1
    assert result.grid.level_origins(result.cells).tolist() == [[64, 100]]
    assert result.grid.level0_origins(result.cells).tolist() == [[257, 401]]


def test_imported_patches_of_another_size_or_slide() -> None:
    with pytest.raises(SlideError, match=r"128 level-0 px wide and those of tiling.patch_px=64 .* are 64"):
        found(overview(), coordinates([[0, 0]], 128))
    with pytest.raises(SlideError, match="another slide"):
        found(overview(), coordinates([[WIDTH, 0]]))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, int, TilingConfig]:
    """A mask with tissue, level-0 px along one of its px, and a tiling."""
    height, width = draw(st.integers(3, 23)), draw(st.integers(3, 29))
    mask = np.random.default_rng(draw(st.integers(0, 999))).random((height, width)) < draw(st.floats(0.02, 0.9))
    mask[-1, -1] = True
    patch = draw(st.integers(8, 40))
    fields = spec(patch_px=patch, overlap_px=draw(st.integers(0, patch - 1)), mpp=None, min_tissue=0)
    return mask, draw(st.sampled_from([3, 4, 7])), fields


def find_on(mask: np.ndarray, scale: int, fields: TilingConfig) -> Candidates:
    sink = io.BytesIO()
    Image.fromarray(mask).save(sink, format="PNG")
    height, width = mask.shape
    view = Overview(np.full((height, width, 3), 240, np.uint8), np.zeros(mask.shape, bool), float(scale))
    levels = (Level(width * scale, height * scale, 1.0),)
    return find_candidates(view, levels, fields, None, Guide(mask=ExternalMask("a.png", sink.getvalue())))


@given(scene=scenes(), edge=st.sampled_from(["inside", "pad"]))
def test_every_px_of_tissue_lies_in_a_patch(scene: tuple[np.ndarray, int, TilingConfig], edge: str) -> None:
    mask, scale, fields = scene
    found = find_on(mask, scale, fields.model_copy(update={"edge": edge}))
    assert uncovered(mask, scale, found.grid.level0_boxes(found.cells)) == 0
    assert found.beyond == 0


@given(scene=scenes())
def test_what_is_dropped_at_the_edge_is_counted(scene: tuple[np.ndarray, int, TilingConfig]) -> None:
    mask, scale, fields = scene
    mask[0, 0] = True
    assume(min(mask.shape) * scale >= fields.edge_px)
    found = find_on(mask, scale, fields.model_copy(update={"edge": "drop"}))
    assert found.beyond == pytest.approx(uncovered(mask, scale, found.grid.level0_boxes(found.grid.cells())), abs=1e-6)
    whole = find_on(mask, scale, fields.model_copy(update={"edge": "inside"}))
    assert considered(found) <= considered(whole)


def test_a_threshold_is_taken_as_it_is_and_told_with_the_histogram() -> None:
    view = overview(("tissue", (640, 640, 1920, 1600)))
    own = found(view)
    assert own.tissue is not None
    assert 12 <= own.tissue.threshold <= 30
    assert sum(own.tissue.histogram) == view.rgb.shape[0] * view.rgb.shape[1]
    given_ = found(view, tissue_threshold=55.0)
    assert given_.tissue is not None
    assert given_.tissue.threshold == 55.0
    with pytest.raises(SlideError, match="no-tissue|nothing on it is coloured"):
        found(view, tissue_threshold=200.0)
    assert found(view, tissue="none").tissue is None


def test_closing_fills_gaps_of_glass_and_no_ink() -> None:
    pieces = [("tissue", (640, top, 1920, top + 160)) for top in range(640, 1600, 224)]  # 64 level-0 px between them
    view = overview(*pieces, ("pen", (1200, 640, 1296, 1536)))
    plain, closed = (found(view, tissue_closing_px=px) for px in (0, 96))
    gap, pen = np.s_[104:106, 90:140], np.s_[84:98, 152:160]
    assert not plain.mask[gap].any()
    assert closed.mask[gap].all()
    assert not closed.mask[pen].any()
    assert not closed.mask[:70].any()
    assert (closed.mask >= plain.mask).all()
