"""There and back: our coordinates as another tool's file, and that file as the patches of a new tiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.export import export_coordinates
from pipeline.guide import guide_files
from pipeline.interchange import Tool
from pipeline.patches import PatchStore
from pipeline.tiler import store_slide
from tests.pipeline.small import PATCH, small_config, write_cohort
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
