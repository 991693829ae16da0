"""The quality page, its table and its outlines."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest.tiler import store_slide
from pipeline.results.quality import PICTURES, chosen, quality_page, write_outlines, write_quality
from pipeline.results.quality_rows import ROWS, look_up, quality_csv, quality_rows
from pipeline.store.patches import PatchStore, SlideStatus
from tests.pipeline import tiled as slides
from tests.pipeline.results.test_report import Page
from tests.pipeline.small import small_config, write_cohort, write_slide
from tests.pipeline.tiling.test_interchange import clam
from tests.synth import tissue_rgb, write_pyramid, zero_tile


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchStore, list[SlideStatus]]:
    """Three good slides, one of them under two names, and a bad one with an evil name."""
    folder = tmp_path_factory.mktemp("quality")
    config, cohort = small_config(), write_cohort(folder, ["no", "yes", "no"])
    (folder / "bad.png").write_bytes(b"not an image")
    bad = replace(cohort.slides[0], slide_id="<script>alert(1)", uri=str(folder / "bad.png"))
    twin = replace(cohort.slides[0], slide_id="s0/again")
    statuses = [store_slide(slide, config.tiling, str(folder / "store")) for slide in (*cohort.slides, twin, bad)]
    return PatchStore(str(folder / "store"), config.tiling.fingerprint()), statuses


def test_page_table_and_outlines(tiled: tuple[PatchStore, list[SlideStatus]], tmp_path: Path) -> None:
    store, statuses = tiled
    outputs = write_quality(store, quality_rows(store, statuses), str(tmp_path), "study", "abc", PICTURES)
    write_outlines(store, quality_rows(store, statuses), str(tmp_path))
    page = Path(outputs["quality"]).read_text()
    parsed = Page()
    parsed.feed(page.replace("<svg", "<div").replace("</svg", "</div"))
    assert parsed.sources
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "not-a-slide: 1" in page
    assert "Outside" not in page  # nothing was imported
    assert ">4 slides</text>" in page  # the four have as many patches
    assert ">1 slide</text>" in quality_page(store, quality_rows(store, statuses[:1]), "study", "abc")
    assert page.count("<figure>") == 4

    with Path(outputs["quality_table"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == ["s0", "s1", "s2", "s0/again", "<script>alert(1)"]
    assert [row["status"] for row in rows] == ["committed"] * 4 + ["quarantined"]
    for row in rows[:4]:
        assert int(row["patches"]) + int(row["rejected_tissue"]) + int(row["rejected_artefact"]) == 6 * 4
        assert (row["width"], row["height"], row["mpp_source"]) == ("211", "157", "none")
        assert float(row["tissue"]) == pytest.approx(165 * 149 / (211 * 157), abs=0.03)

    outlines = sorted((tmp_path / "tissue").iterdir())
    assert [path.name for path in outlines] == ["s0.geojson", "s0_again~853ab97a.geojson", "s1.geojson", "s2.geojson"]
    assert outlines[0].read_bytes() == outlines[1].read_bytes()
    (feature,) = json.loads(outlines[0].read_text())["features"]
    xs = [x for x, _ in feature["geometry"]["coordinates"][0]]
    assert (min(xs), max(xs)) == (pytest.approx(5, abs=2), pytest.approx(170, abs=2))


def test_the_threshold_is_shown_with_the_histogram(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    store, statuses = tiled
    (row,) = quality_rows(store, statuses[:1])
    assert sum(row.saturations) == 211 * 157
    page = quality_page(store, [row], "study", "abc")
    assert f"tissue from <b>{row.tissue_threshold:.3g}</b> of 255 (tiling.tissue_threshold)" in page
    assert page.count("<rect") == 1 + sum(count > 0 for count in row.saturations)  # and one bar of patches a slide
    (read,) = csv.DictReader(io.StringIO(quality_csv([row]).decode()))
    assert float(read["tissue_threshold"]) == row.tissue_threshold
    assert "saturations" not in read


@pytest.mark.parametrize("edge", ["inside", "pad", "drop"])
def test_tissue_beyond_the_last_patches_is_told(tmp_path: Path, edge: str) -> None:
    rgb = tissue_rgb(613, 487)
    rgb[440:487, 300:500] = rgb[150:197, 150:350]  # tissue at the lower edge: whole patches of 64 px end at 448
    path = write_pyramid(tmp_path / "s.tiff", rgb, levels=1)
    spec = TilingConfig.model_validate({"patch_px": 64, "edge": edge, "min_tissue": 0.1})
    status = store_slide(slides.row(path), spec, str(tmp_path / "store"))
    store = PatchStore(str(tmp_path / "store"), spec.fingerprint())
    (row,) = rows = quality_rows(store, [status])
    page = quality_page(store, rows, "study", "abc")
    (read,) = csv.DictReader(io.StringIO(quality_csv(rows).decode()))
    assert float(read["tissue_beyond"]) == row.tissue_beyond
    lost = np.ptp(rgb.astype(int), axis=2) > 20
    share = lost[448:].sum() / lost.sum()
    assert row.tissue_beyond == (pytest.approx(share, abs=0.02) if edge == "drop" else 0)
    assert ("of it beyond the last patches" in page) == (edge == "drop")
    assert ("Tissue beyond the last patches" in page) == (edge == "drop")


def test_a_thousand_slides_are_a_page_of_bounded_size(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    store, statuses = tiled
    (some, *_, bad) = quality_rows(store, statuses)
    many = [replace(some, slide_id=f"good-{i:05d}", patches=i % 700 + 1) for i in range(1300)]
    many += [replace(bad, slide_id=f"bad-{i:05d}") for i in range(1200)]
    page = quality_page(store, many, "study", "abc")
    assert page.count("<figure>") == PICTURES
    assert f"{PICTURES} of 1,300 slides, so that the page stays small" in page
    assert f"The first {ROWS:,}; the others stand in quality.csv" in page
    assert f"The {ROWS:,} with the fewest patches of 2,500" in page
    pictures = sum(len(data) for data in re.findall(r'"data:[^"]*"', page))
    assert len(page) - pictures < 1_500_000
    assert pictures < PICTURES * 300_000


def test_those_to_look_at_first_are_shown_first(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    some = quality_rows(*tiled)[0]
    rows = [replace(some, slide_id=f"s{i:03d}", patches=1000 + i) for i in range(200)]
    rows[120] = replace(rows[120], rejected_artefact=7)
    rows[150] = replace(rows[150], bad_tiles=9)
    picked = chosen(rows)
    assert len(picked) == len({row.slide_id for row in picked}) == PICTURES
    assert [row.slide_id for row in picked[:12]] == [f"s{i:03d}" for i in range(12)]
    assert [row.slide_id for row in picked[12:14]] == ["s150", "s120"]
    assert picked[-1].slide_id == "s199"
    assert chosen(rows[:20]) == rows[:20]


def test_places_that_were_imported_and_left_out_have_their_reason(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "s.tiff", tissue_rgb(613, 487), levels=1)
    zero_tile(path, 0, 5)  # x 480 to 613 (of 720), y 240 to 480
    corners = np.array([[0, 0], [64, 64], [64, 64], [600, 0], [0, 480], [-5, 0], [128, 128], [500, 300]])
    (tmp_path / "s.h5").write_bytes(clam(corners, patch_size=64, patch_level=0, downsample=(1.0, 1.0)))
    spec = TilingConfig(patch_px=64, max_bad_tiles=0.5)
    status = store_slide(replace(slides.row(path), coords=str(tmp_path / "s.h5")), spec, str(tmp_path / "store"))
    store = PatchStore(str(tmp_path / "store"), spec.fingerprint())
    (found,) = csv.DictReader(io.StringIO(quality_csv(quality_rows(store, [status])).decode()))
    counts = {name: int(value) for name, value in found.items() if name.startswith("rejected_") and value}
    assert counts == {"rejected_tissue": 0, "rejected_artefact": 0, "rejected_outside": 3, "rejected_twice": 1}
    assert (int(found["patches"]), int(found["bad_tiles"])) == (3, 1)
    assert 3 + 1 + sum(counts.values()) == len(corners)
    page = quality_page(store, quality_rows(store, [status]), "study", "abc")
    assert "3 imported ones outside of the slide, 1 listed twice" in page
    assert '<th class="number">Outside</th><th class="number">Twice</th>' in page


def refused(kind: str, folder: Path) -> Path:
    """A slide that was seen before it was given up, as a single tile of 1031 x 787 px."""
    rgb = np.clip(np.random.default_rng(5).normal(241, 1, (787, 1031, 3)), 0, 255).astype(np.uint8)
    pen, tissue = (60, 90, 180), tissue_rgb(1031, 787)
    if kind == "artefact":
        rgb[200:600, 100:900] = pen
    if kind == "too-little-tissue":
        rgb[100:120, 200:230] = tissue[300:320, 300:330]
    if kind == "bad-tiles":
        rgb = tissue
    path = write_pyramid(folder / f"{kind}.tiff", rgb, levels=2)
    for tile in range(12 if kind == "bad-tiles" else 0):
        zero_tile(path, 0, tile)
    return path


@pytest.mark.parametrize(
    "store_it", [store_slide, lambda slide, spec, store: slides.tile_in_shares(slide, store, spec)]
)
@pytest.mark.parametrize("kind", ["no-tissue", "artefact", "too-little-tissue", "bad-tiles"])
def test_a_slide_that_was_given_up_is_shown_beside_the_reason(
    kind: str, store_it: Callable[..., SlideStatus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides.small_tasks(monkeypatch.setattr)
    path = refused(kind, tmp_path)
    spec = TilingConfig(patch_px=64)
    status = store_it(slides.row(path), spec, str(tmp_path / "store"))
    assert (status.reason or "").partition(":")[0] == kind
    store = PatchStore(str(tmp_path / "store"), spec.fingerprint())
    rows = look_up(store, [slides.row(path)], spec)  # from what is recorded, as any later run finds it
    assert rows == quality_rows(store, [status])
    assert b"base64" not in quality_csv(rows)
    assert len(quality_csv(rows)) < 1000
    (source,) = re.findall(r'<img class="small" src="([^"]*)"', quality_page(store, rows, "study", "abc"))
    shown = simplejpeg.decode_jpeg(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))
    assert shown.shape == (391, 512, 3)
    whole = tissue_rgb(1031, 787) if kind == "bad-tiles" else tifffile.imread(path, level=0)
    small = np.asarray(Image.fromarray(whole).resize((512, 391), Image.Resampling.BOX))
    assert np.abs(shown.astype(int) - small).mean() < 4
    green = (shown[..., 1].astype(int) - shown[..., 0] > 50) & (shown[..., 1] < 160)
    rim = 2 * (400 + 200) if kind == "artefact" else 2 * (15 + 10) if kind == "too-little-tissue" else 0
    assert green.sum() == pytest.approx(rim, rel=0.6, abs=5)


def test_pictures_of_slides_that_were_given_up_are_bounded(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    bad = replace(quality_rows(*tiled)[-1], picture="AAAA")
    many = [replace(bad, slide_id=f"bad-{i:03d}") for i in range(2 * PICTURES)]
    page = quality_page(tiled[0], many, "study", "abc")
    assert page.count('<img class="small"') == PICTURES
    assert "<th>Picture</th>" not in quality_page(tiled[0], quality_rows(*tiled), "study", "abc")


def test_an_empty_cohort_has_a_page(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    page = quality_page(tiled[0], [quality_rows(*tiled)[-1]], "study", "abc")
    assert "No slide is tiled" in page


def test_slides_that_are_not_tiled_or_gone_are_counted(tmp_path: Path) -> None:
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "yes", "no"])
    store_slide(cohort.slides[1], config.tiling, str(tmp_path / "store"))
    Path(cohort.slides[2].uri).unlink()
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    rows = look_up(store, cohort.slides, config.tiling)
    assert [(row.status, row.category) for row in rows] == [
        ("absent", ""),
        ("committed", ""),
        ("quarantined", "missing"),
    ]
    assert "1 not tiled yet" in quality_page(store, rows, "study", "abc")


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-2-3", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://a","b")'])
def test_no_cell_of_the_table_is_a_formula(tiled: tuple[PatchStore, list[SlideStatus]], evil: str) -> None:
    armed = replace(quality_rows(*tiled)[0], slide_id=evil, uri=evil, reason=evil, mpp=-0.25, rejected_tissue=-3)
    (read,) = csv.DictReader(io.StringIO(quality_csv([armed]).decode(), newline=""))
    assert {read["slide_id"], read["uri"], read["reason"]} == {f"'{evil}"}
    assert (read["mpp"], read["rejected_tissue"], read["status"]) == ("-0.25", "-3", "committed")
    plain = next(csv.DictReader(io.StringIO(quality_csv([replace(armed, slide_id="a-1")]).decode())))
    assert plain["slide_id"] == "a-1"


def test_artefacts_that_were_not_looked_for_are_not_said_to_be_none(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.png", 1)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    pages = {}
    for artefacts in ("keep", "remove"):
        spec = TilingConfig.model_validate({"patch_px": 32, "mpp": None, "min_tissue": 0.5, "artefacts": artefacts})
        store = PatchStore(str(tmp_path / artefacts), spec.fingerprint())
        (row,) = quality_rows(store, [store_slide(slide, spec, str(tmp_path / artefacts))])
        pages[artefacts] = quality_page(store, [row], "study", "abc")
        assert (row.rejected_artefact is None) == (artefacts == "keep")
    assert "not looked for" in pages["keep"]
    assert "not looked for" not in pages["remove"]


def test_the_sharpness_is_shown_by_slide_and_by_site(tmp_path: Path) -> None:
    """Least sharp patches with their figure, those left out counted; nothing of it where it was not asked for."""
    rgb = tissue_rgb(613, 487)
    rgb[:, 330:] = rgb[:, 330:331]  # stripes without detail along one axis
    cohort = []
    for name, site, picture in (("a", "north", rgb), ("b", "south", rgb[::-1].copy())):
        path = write_pyramid(tmp_path / f"{name}.tiff", picture, levels=1)
        cohort.append(replace(slides.row(path), extra={"site": site}))
    pages, tables = {}, {}
    for limit in (None, 0.0, 3900.0):
        spec = TilingConfig(patch_px=64, min_tissue=0.3, min_sharpness=limit)
        statuses = [store_slide(slide, spec, str(tmp_path / "store")) for slide in cohort]
        store = PatchStore(str(tmp_path / "store"), spec.fingerprint())
        rows = look_up(store, cohort, spec)
        assert rows == list(quality_rows(store, statuses))
        pages[limit] = quality_page(store, rows, "study", "abc", slides=cohort)
        tables[limit] = list(csv.DictReader(io.StringIO(quality_csv(rows).decode())))
    assert {row["sharpness"] + row["rejected_blurred"] for row in tables[None]} == {""}
    assert "harpness" not in pages[None]
    assert "Blurred" not in pages[None]
    assert {row["rejected_blurred"] for row in tables[0.0]} == {"0"}
    for row, before in zip(tables[3900.0], tables[0.0], strict=True):
        assert int(row["patches"]) + int(row["rejected_blurred"]) == int(before["patches"])
        assert float(row["sharpness"]) >= float(before["sharpness"])
        assert int(row["rejected_blurred"]) > 0
        assert f"{row['rejected_blurred']} blurred ones left out" in pages[3900.0]
    for limit in (0.0, 3900.0):
        assert "<td>site: north</td>" in pages[limit]
        assert pages[limit].count("The least sharp patches, with their sharpness") == 2
        assert ("left out below <b>3,900</b> (tiling.min_sharpness)" in pages[limit]) == (limit > 0)
    assert "site: north" not in quality_page(store, rows, "study", "abc")


def test_the_least_sharp_slides_are_among_those_shown(tiled: tuple[PatchStore, list[SlideStatus]]) -> None:
    some = quality_rows(*tiled)[0]
    many = [replace(some, slide_id=f"{i:03d}", patches=100 + i, sharpness=float(i * 37 % 101)) for i in range(101)]
    names = [row.slide_id for row in chosen(many)]
    assert len(names) == len(set(names)) == PICTURES
    dull = sorted(many[PICTURES // 3 :], key=lambda row: row.sharpness or 0)[: PICTURES // 6]
    assert names[PICTURES // 3 :][: PICTURES // 6] == [row.slide_id for row in dull]
    unknown = [replace(row, sharpness=None) for row in many]
    assert len(chosen(unknown)) == PICTURES
