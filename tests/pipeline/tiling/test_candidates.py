"""Which places become patches, and the reason where none does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Level, Overview
from pipeline.tiling.candidates import EXAMPLES, Candidates, find_candidates
from pipeline.tiling.guide import Guide
from pipeline.tiling.interchange import Coordinates
from pipeline.tiling.masks import ExternalMask
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
    assert result.considered == 62 * 50
    corners = result.grid.level0_origins(result.cells)
    assert corners.min(axis=0).tolist() == [640, 640]
    assert corners.max(axis=0).tolist() == [1920 - 64, 1600 - 64]
    assert result.rejects["artefact"] == pytest.approx(20 * 10, abs=35)
    assert found(view, artefacts="keep").considered == result.considered
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
    assert len(result.cells) < 0.02 * result.considered


@pytest.mark.parametrize(
    ("areas", "fields", "reason"),
    [
        ([], {}, "no-tissue"),
        ([("pen", (640, 640, 1920, 1600))], {}, "artefact"),
        ([("tissue", (640, 640, 680, 680))], {"patch_px": 512}, "too-little-tissue"),
        ([("tissue", (640, 640, 1920, 1600))], {"patch_px": 3300}, "too-small"),
    ],
)
def test_nothing_has_its_reason(areas: list[Area], fields: dict[str, object], reason: str) -> None:
    with pytest.raises(SlideError) as caught:
        find_candidates(overview(*areas), LEVELS, spec(**fields), 0.5, Guide())
    assert caught.value.reason == reason


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
    assert result.considered == 6


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
