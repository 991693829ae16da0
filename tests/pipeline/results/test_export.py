"""There and back: our coordinates as another tool's file, and that file as the patches of a new tiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import TilingConfig
from pipeline.errors import StageError
from pipeline.ingest.tiler import store_slide
from pipeline.results.export import export_coordinates, stored_grid
from pipeline.slides.open import Level
from pipeline.store.patches import PatchStore
from pipeline.tiling.grid import plan_grid
from pipeline.tiling.guide import guide_files
from pipeline.tiling.interchange import Tool, coordinates_h5, read_coordinates
from tests.pipeline.small import PATCH, small_config, write_cohort
from tests.pipeline.tiled import row
from tests.synth import tissue_rgb, write_pyramid

IDS = ["a/1", "b", "A\\1", "B", "x y#z", "é", "../é", "肝臓" * 90]  # of two slides by turns


@pytest.mark.parametrize("tool", ["trident", "clam"])
def test_a_store_tiled_from_its_own_export_is_the_same(
    tmp_path: Path, tool: Tool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        write_pyramid(tmp_path / f"s{number}.tiff", tissue_rgb(1013, 787, seed=number))
    lines = [f"{name},s{number % 2}.tiff,yes" for number, name in enumerate(IDS)]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,label", *lines, "never tiled,s0.png,no"]))
    tiling = {"patch_px": 64, "mpp": 1.0}
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")}, tiling=tiling, storage={"patches": str(tmp_path / "store")}
    )
    slides = write_cohort(tmp_path, ["no", "no"]).slides
    slides = tuple(
        replace(slides[0], slide_id=name, uri=str(tmp_path / f"s{number % 2}.tiff")) for number, name in enumerate(IDS)
    )
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    first = [store.slide(str(store_slide(slide, config.tiling, str(tmp_path / "store")).key)) for slide in slides]
    written = export_coordinates(config, tool, str(tmp_path / "out"))
    assert caplog.messages == ["export: never tiled is left out: not tiled yet"]
    suffix = {"trident": "_patches.h5", "clam": ".h5"}[tool]
    assert [Path(uri).name for uri in written.values()][:2] == [f"a_1~773232ab{suffix}", f"b{suffix}"]
    assert len(list((tmp_path / "out").iterdir())) == len(IDS)

    given = small_config(tiling={**tiling, "coords": str(tmp_path / "out")}).tiling
    assert given.fingerprint() == config.tiling.fingerprint()
    assert [guide_files(slide, given)[1] for slide in slides] == list(written.values())
    for slide, before in zip(slides[:2], first[:2], strict=True):
        status = store_slide(slide, given, str(tmp_path / "again"))
        assert status.key is not None, status.error
        assert status.key != before.key
        again = PatchStore(str(tmp_path / "again"), given.fingerprint()).slide(status.key)
        assert again.payloads(range(again.n_patches)) == before.payloads(range(before.n_patches))
        own, theirs = (stored.positions(np.arange(stored.n_patches)) for stored in (before, again))
        assert (own == theirs)[
            own < own.max(axis=0)
        ].all()  # of the last ones a file does not say that they are shifted


def test_patches_that_reach_over_the_edge_are_not_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pyramid(tmp_path / "s.tiff", tissue_rgb(613, 487))
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,label\ns,{tmp_path}/s.tiff,yes\n")
    tiling = {"patch_px": 64, "mpp": 0.5, "tissue": "none", "edge": "pad"}
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")}, tiling=tiling, storage={"patches": str(tmp_path / "store")}
    )
    slide = row(tmp_path / "s.tiff")
    store_slide(slide, config.tiling, str(tmp_path / "store"))
    (uri,) = export_coordinates(config, "clam", str(tmp_path / "out")).values()
    (message,) = caplog.messages
    assert (
        message == "export: s: 17 patches that reach over the slide's edge are left out: clam shows other pixels there"
    )
    corners = read_coordinates(Path(uri).read_bytes(), uri).corners
    assert len(corners) == 9 * 7
    assert (corners + 64 <= (613, 487)).all()


def test_patches_that_overlap_in_the_file_they_came_from_overlap_in_the_export(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(1013, 787))
    half = TilingConfig(patch_px=64, overlap_px=32)
    stored = PatchStore(str(tmp_path / "half"), half.fingerprint()).slide(
        str(store_slide(row(path), half, str(tmp_path / "half")).key)
    )
    (tmp_path / "a.h5").write_bytes(coordinates_h5(stored_grid(stored, "a"), "trident", "out", 0.5))
    plain, store = TilingConfig(patch_px=64), str(tmp_path / "again")
    status = store_slide(replace(row(path), coords=str(tmp_path / "a.h5")), plain, store)
    again = stored_grid(PatchStore(store, plain.fingerprint()).slide(str(status.key)), "a")
    assert again.overlap_px == 32
    assert read_coordinates(coordinates_h5(again, "trident", "out", 0.5), "a.h5").step == 32


@given(mpp=st.floats(0.2, 0.5), patch_px=st.integers(32, 512), share=st.floats(0, 0.9))
def test_what_the_config_says_of_the_overlap_is_what_the_grid_has(mpp: float, patch_px: int, share: float) -> None:
    spec = TilingConfig(patch_px=patch_px, overlap_px=int(share * patch_px), mpp=0.5)
    grid = plan_grid((Level(4000, 3000, 1.0), Level(1000, 750, 4.0)), spec, mpp)
    found = grid.patch_px - grid.stride_px * grid.downsample / grid.scale  # as `stored_grid` computes it
    assert abs(found - spec.overlap_px) < 1


def test_without_a_tiled_slide_there_is_nothing_to_export(tmp_path: Path) -> None:
    write_cohort(tmp_path, ["no"])
    (tmp_path / "cohort.csv").write_text("slide_id,uri\ns0,s0.png\n")
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")},
        storage={"patches": str(tmp_path / "store")},
        tiling={"patch_px": PATCH},
    )
    with pytest.raises(StageError, match="run the tile stage"):
        export_coordinates(config, "clam", str(tmp_path / "out"))
