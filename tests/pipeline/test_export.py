"""There and back: our coordinates as another tool's file, and that file as the patches of a new tiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.export import export_coordinates
from pipeline.interchange import Tool
from pipeline.patches import PatchStore
from pipeline.tiler import store_slide
from tests.pipeline.small import PATCH, small_config, write_cohort
from tests.synth import tissue_rgb, write_pyramid


@pytest.mark.parametrize("tool", ["trident", "clam"])
def test_a_store_tiled_from_its_own_export_is_the_same(
    tmp_path: Path, tool: Tool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        write_pyramid(tmp_path / f"s{number}.tiff", tissue_rgb(1013, 787, seed=number))
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label\na/1,s0.tiff,yes\nb,s1.tiff,no\nnever tiled,s0.png,no\n")
    tiling = {"patch_px": 64, "mpp": 1.0}
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")}, tiling=tiling, storage={"patches": str(tmp_path / "store")}
    )
    slides = write_cohort(tmp_path, ["no", "no"]).slides
    slides = tuple(
        replace(slide, slide_id=name, uri=str(tmp_path / f"s{i}.tiff"))
        for i, (slide, name) in enumerate(zip(slides, ("a/1", "b"), strict=True))
    )
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    first = [store.slide(str(store_slide(slide, config.tiling, str(tmp_path / "store")).key)) for slide in slides]
    written = export_coordinates(config, tool, str(tmp_path / "out"))
    assert caplog.messages == ["export: never tiled is left out: not tiled yet"]
    suffix = {"trident": "_patches.h5", "clam": ".h5"}[tool]
    assert [Path(uri).name for uri in written.values()] == [f"a_1{suffix}", f"b{suffix}"]

    given = small_config(tiling={**tiling, "coords": str(tmp_path / "out")}).tiling
    assert given.fingerprint() == config.tiling.fingerprint()
    named = replace(slides[0], coords=written["a/1"])
    for slide, before in zip((named, slides[1]), first, strict=True):  # by the cohort's column, by the folder
        status = store_slide(slide, given, str(tmp_path / "again"))
        assert status.key is not None, status.error
        assert status.key != before.key
        again = PatchStore(str(tmp_path / "again"), given.fingerprint()).slide(status.key)
        assert again.payloads(range(again.n_patches)) == before.payloads(range(before.n_patches))
        assert (again.positions() == before.positions()).all()


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
