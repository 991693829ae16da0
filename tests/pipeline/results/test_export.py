"""There and back: our coordinates as another tool's file, and that file as the patches of a new tiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bags.embed import Embedder, embed_slide
from pipeline.bags.given import GivenSlide
from pipeline.bags.sources import feature_store, open_sources, patch_root, patch_store
from pipeline.cohort.table import read_cohort
from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, StageError, StorageError
from pipeline.ingest.cohorts import listed
from pipeline.ingest.features import index_cohort
from pipeline.ingest.tiler import store_slide
from pipeline.results.export import export_coordinates, export_features, stored_grid
from pipeline.results.quality import review
from pipeline.slides.open import Level
from pipeline.store.patches import PatchStore
from pipeline.tiling.grid import plan_grid
from pipeline.tiling.guide import guide_files
from pipeline.tiling.interchange import FeatureTool, Tool, coordinates_h5, read_coordinates
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


def as_stamp_reads(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """STAMP's documented layout: features, places and edge of a tile, both in microns."""
    with h5py.File(path) as file:
        assert file.attrs["unit"] == "um"
        return file["feats"][:], file["coords"][:], float(file.attrs["tile_size_um"])


def as_clam_reads(folder: Path, slide_id: str) -> tuple[torch.Tensor, np.ndarray]:
    """CLAM's bags: of pt_files for training, of h5_files where places are wanted too."""
    with h5py.File(folder / "h5_files" / f"{slide_id}.h5") as file:
        features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    assert torch.equal(torch.load(folder / "pt_files" / f"{slide_id}.pt", weights_only=True), features)
    return features, coords


@pytest.mark.parametrize("tool", ["trident", "clam", "stamp"])
def test_features_go_out_and_come_back_bit_for_bit(tmp_path: Path, tool: FeatureTool) -> None:
    """Own store, another tool's layout, and back as features that were given."""
    for number in range(2):
        write_pyramid(tmp_path / f"s{number}.tiff", tissue_rgb(1013, 787, seed=number))
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label\na,s0.tiff,yes\nb,s1.tiff,no\n")
    places = {"patches": str(tmp_path / "store"), "features": str(tmp_path / "features")}
    shared: dict[str, Any] = {"cohort": {"uri": str(tmp_path / "cohort.csv")}, "tiling": {"patch_px": 64, "mpp": 1.0}}
    encoder = {"name": "resnet18", "stages": 2}
    ours = small_config(storage=places, embed={"encoder": encoder, "batch": 8}, **shared)
    patches, (store, settings) = patch_store(ours), feature_store(ours)
    made = []
    for slide in read_cohort(str(tmp_path / "cohort.csv")).slides:
        stored = patches.slide(str(store_slide(slide, ours.tiling, str(tmp_path / "store")).key))
        made.append(embed_slide(Embedder(settings), stored, store, threads=1))
    store.append([row for slide in made for row in store.rows(slide.patches.key)])
    patches.look_again()
    written = export_features(ours, tool, str(tmp_path / "out"))
    assert list(written) == ["a", "b"]

    folder = tmp_path / "out" / "h5_files" if tool == "clam" else tmp_path / "out"
    given = small_config(
        storage=places,
        tiling=shared["tiling"],
        cohort={**shared["cohort"], "features": str(folder)},
        model={"encoder": {"name": "features", "features": made[0].dim}},
        train={"augment": False},
    )
    slides = [replace(slide, mpp=made[0].mpp if tool == "stamp" else None) for slide in listed(given).slides]
    statuses = index_cohort(slides, given.tiling, patch_root(given), on_status=lambda _: None)
    back = open_sources(given, slides, {status.slide_id: str(status.key) for status in statuses})
    for before, (_, after) in zip(made, back, strict=True):
        rows = np.arange(before.n_patches)
        assert isinstance(after, GivenSlide)
        assert after.vectors(rows).tobytes() == before.vectors(rows).tobytes()
        assert after.vectors(rows).dtype == np.float16
        assert np.array_equal(after.index().x, before.index().x)
        assert np.array_equal(after.index().y, before.index().y)
        assert after.extent == pytest.approx(before.extent, abs=0.5)
        assert after.mpp == (None if tool == "clam" else pytest.approx(before.mpp, rel=0.01))
        own, theirs = before.positions(rows), after.positions(rows)
        assert (own == theirs)[own < own.max(axis=0)].all()
    corners = np.stack([made[0].index().x, made[0].index().y], axis=1)
    if tool == "stamp":
        features, microns, edge = as_stamp_reads(folder / "a.h5")
        assert np.array_equal(np.rint(microns / made[0].mpp), corners)
        assert edge == pytest.approx(64, rel=0.01)
    elif tool == "clam":
        tensor, coords = as_clam_reads(tmp_path / "out", "a")
        assert np.array_equal(coords, corners)
        features = tensor.numpy()
    else:
        return
    assert np.array_equal(features, made[0].vectors(np.arange(len(corners))))


def test_without_features_there_is_nothing_to_export(tmp_path: Path) -> None:
    write_cohort(tmp_path, ["no"])
    (tmp_path / "cohort.csv").write_text("slide_id,uri\ns0,s0.png\n")
    (tmp_path / "g.csv").write_text("slide_id,features\ns0,s0.h5\n")
    places = {"patches": str(tmp_path / "store"), "features": str(tmp_path / "features")}
    config = small_config(cohort={"uri": str(tmp_path / "cohort.csv")}, storage=places)
    with pytest.raises(ConfigError, match="give embed.encoder.name"):
        export_features(config, "clam", str(tmp_path / "out"))
    config = small_config(
        cohort={"uri": str(tmp_path / "cohort.csv")}, storage=places, embed={"encoder": {"name": "resnet18"}}
    )
    store_slide(row(tmp_path / "s0.png"), config.tiling, str(tmp_path / "store"))
    with pytest.raises(StorageError, match="run the embed stage"):
        export_features(config, "clam", str(tmp_path / "out"))
    features = {"encoder": {"name": "features", "features": 7}}
    given = small_config(cohort={"uri": str(tmp_path / "g.csv")}, model=features, train={"augment": False})
    for export in (export_features, export_coordinates):
        with pytest.raises(StageError, match="made by another tool"):
            export(given, "clam", str(tmp_path / "out"))
    with pytest.raises(StageError, match="qc: the cohort's features were made by another tool"):
        review(given)


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
