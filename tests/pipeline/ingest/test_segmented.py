"""Tissue by a network through the tile stage: in the process that reads the slide, and part of the store's key."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import TilingConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.ingest import tiler
from pipeline.ingest.graph import tile_cohort
from pipeline.ingest.isolated import begin_slide, store_slide
from pipeline.results.quality import quality_page
from pipeline.results.quality_rows import quality_csv, quality_rows
from pipeline.storage.files import source_version
from pipeline.store.patches import PLANS, PatchStore
from pipeline.store.verify import verify_store
from pipeline.tiling.evidence import read_mask_png
from pipeline.tiling.guide import check_network
from tests.pipeline.segmentation.networks import Small, Toy, Undefined, scripted, settings
from tests.pipeline.tiled import row
from tests.pipeline.tiling.test_interchange import trident
from tests.synth import tissue_rgb, write_pyramid


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(Toy(), tmp_path_factory.mktemp("network") / "toy.pt")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tissue, and a blue stroke that Otsu's rule would call an artefact and this network glass."""
    rgb = tissue_rgb(1013, 787)
    rgb[20:120, 500:900] = (40, 60, 200)
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", rgb, levels=2)


def spec(network: Path, **fields: Any) -> TilingConfig:
    given = {"patch_px": 64, "tissue": "model", "tissue_model": settings(network)}
    return TilingConfig.model_validate({**given, **fields})


def test_patches_stand_where_the_network_finds_tissue(slide: Path, network: Path, tmp_path: Path) -> None:
    asked = spec(network, min_tissue=0.5)
    check_network([row(slide)], asked)
    status = store_slide(row(slide), asked, str(tmp_path))
    assert (status.status, status.reason) == ("committed", None)
    store = PatchStore(str(tmp_path), asked.fingerprint())
    stored, facts = store.slide(str(status.key)), store.facts(str(status.key))
    assert facts["spec"]["tissue_model"]["sha256"] == settings(network).sha256
    assert "uri" not in facts["spec"]["tissue_model"]
    assert "threshold" not in facts["evidence"]["mask"]
    mask = read_mask_png(stored.mask())
    whole = np.asarray(Image.fromarray(mask).resize((1013, 787), Image.Resampling.NEAREST))
    index = stored.index()
    kept = {(x, y) for x, y in zip(index.x.tolist(), index.y.tolist(), strict=True)}
    shares = {(x, y): whole[y : y + 64, x : x + 64].mean() for y in range(0, 704, 64) for x in range(0, 949, 64)}
    for corner, share in shares.items():
        assert corner in kept or share < 0.52
        assert corner not in kept or share > 0.48
    assert 20 < len(kept) < 150
    assert not whole[40:100, 520:880].any()
    assert verify_store(str(tmp_path), 1, lambda *_: None).damage == []
    rows = quality_rows(store, [status])
    (read,) = csv.DictReader(io.StringIO(quality_csv(rows).decode()))
    assert (read["tissue_threshold"], read["rejected_artefact"]) == ("", "")
    assert float(read["tissue"]) == pytest.approx(mask.mean(), abs=1e-3)
    assert "Saturation of the px" not in quality_page(store, rows, "study", "abc")
    plan = begin_slide(row(slide), asked, str(tmp_path / PLANS), pixels=False)
    assert getattr(plan, "n_patches", None) == status.n_patches

    masked = tmp_path / "mask.png"
    Image.fromarray(np.eye(2, dtype=np.uint8)[[0]] * 255).resize((1013, 787), Image.Resampling.NEAREST).save(masked)
    by_mask = store_slide(replace(row(slide), mask=str(masked)), asked, str(tmp_path))
    assert by_mask.key != status.key  # a mask of the slide's own goes before the network
    assert set(PatchStore(str(tmp_path), asked.fingerprint()).slide(str(by_mask.key)).index().x.tolist()) == {
        64 * column for column in range(8)
    }


def test_slides_that_a_network_cannot_judge_are_quarantined(tmp_path: Path, network: Path) -> None:
    glass = write_pyramid(tmp_path / "glass.tiff", np.full((307, 411, 3), 244, np.uint8), levels=1)
    coarse = write_pyramid(tmp_path / "coarse.tiff", tissue_rgb(613, 487), levels=1, mpp=2.5)
    silent = write_pyramid(tmp_path / "silent.tiff", tissue_rgb(613, 487), levels=1, mpp=None)
    asked = spec(network, mpp=4.0)
    reasons = [str(tiler.store_slide(row(path), asked, str(tmp_path / "s")).reason) for path in (glass, coarse, silent)]
    assert reasons[0].startswith("no-tissue: none of 1 patches is at least 25% tissue: the network of")
    assert "finds no tissue on it; look at the slide, give a mask, or take another network" in reasons[0]
    assert reasons[1].startswith("too-coarse: level 0 has 2.5 microns per px, coarser than tiling.tissue_model.mpp=2;")
    assert reasons[2].startswith("missing-mpp: the file states no microns per px")


def no_start() -> None:
    raise AssertionError("Ray would be started")


def test_a_network_that_cannot_be_read_costs_no_slide(slide: Path, network: Path, tmp_path: Path) -> None:
    """As on a node that has no such folder; it is read only where it finds a slide's tissue."""
    asked, store = spec(network), str(tmp_path / "store")
    gone = spec(network, tissue_model=settings(network).model_copy(update={"uri": str(tmp_path / "gone.pt")}))
    for work in (tiler.store_slide, store_slide):
        with pytest.raises(StorageError, match=r"tiling.tissue_model.uri=.*gone.pt: .*; every node that tiles must"):
            work(row(slide), gone, store)
    with pytest.raises(StorageError, match=r"tiling.tissue_model.uri="):  # before Ray is started
        tile_cohort([row(slide)], gone, store, cpus=1.0, on_status=print, start=no_start)
    assert list(PatchStore(store, gone.fingerprint()).statuses([row(slide)], [source_version(str(slide))])) == [None]
    done = tiler.store_slide(row(slide), asked, store)
    assert list(tile_cohort([row(slide)], gone, store, cpus=1.0, on_status=print, start=no_start)) == [done]
    masked = replace(row(slide), mask=str(tmp_path / "mask.png"))
    Image.fromarray(np.full((5, 7), 255, np.uint8)).save(str(masked.mask))
    check_network([masked], gone)
    assert tiler.store_slide(masked, gone, store).status == "committed"


def test_a_network_does_not_judge_a_slide_whose_patches_are_given(tmp_path: Path) -> None:
    """One that would refuse it, for it gives no numbers; it is not even read."""
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(211, 157), levels=1)
    placed = {"patch_size": 64, "patch_size_level0": 64, "target_magnification": 40, "overlap": 0}
    placed |= {"level0_width": 211, "level0_height": 157}
    (tmp_path / "a.h5").write_bytes(trident(np.array([[3, 5], [80, 71]]), **placed))
    asked = spec(scripted(Undefined(), tmp_path / "undefined.pt"))
    assert str(tiler.store_slide(row(path), asked, str(tmp_path / "s")).reason).startswith("tissue-model: ")
    network = settings(tmp_path / "undefined.pt")
    for uri in (network.uri, str(tmp_path / "gone.pt")):
        placed_spec = spec(tmp_path / "undefined.pt", tissue_model=network.model_copy(update={"uri": uri}))
        placed_slide = replace(row(path), coords=str(tmp_path / "a.h5"))
        given = tiler.store_slide(placed_slide, placed_spec, str(tmp_path / uri.rpartition("/")[2].partition(".")[0]))
        assert (given.status, given.reason, given.n_patches) == ("committed", None, 2)


def test_a_network_that_does_not_fit_ends_the_run(slide: Path, network: Path, tmp_path: Path) -> None:
    """It is no slide's fault; what the process that reads slides finds comes back whole."""
    small = spec(scripted(Small(), tmp_path / "small.pt"))
    check_network([row(slide)], small)  # which looks at the file, and runs nothing of it
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.uri: .*small.pt makes \[1, 2, 32, 32\] of"):
        store_slide(row(slide), small, str(tmp_path / "store"))
    gone = spec(network, tissue_model=settings(network).model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.sha256: .*toy.pt has [0-9a-f]{64}"):
        check_network([row(slide)], gone)
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.sha256: .*toy.pt has [0-9a-f]{64}"):
        tiler.store_slide(row(slide), gone, str(tmp_path / "store"))


def test_all_but_the_place_of_the_network_is_in_the_key(network: Path, tmp_path: Path) -> None:
    one = spec(network)
    moved = scripted(Toy(), tmp_path / "moved.pt")
    moved.write_bytes(network.read_bytes())
    assert spec(moved).fingerprint() == one.fingerprint()
    other = scripted(Toy(21.0), tmp_path / "other.pt")
    changes: list[dict[str, Any]] = [
        {"threshold": 0.5},
        {"mpp": 1.0},
        {"tile": 128},
        {"overlap": 16},
        {"mean": [0, 0, 1]},
    ]
    changes += [{"outputs": "probabilities"}, {"classes": ["tissue", "glass"]}, {"std": [1, 1, 2]}]
    specs = [spec(network, tissue_model=settings(network, **change)) for change in changes]
    keys = {each.fingerprint() for each in [one, spec(other), *specs, spec(network, min_tissue=0.3)]}
    assert len(keys) == len(changes) + 3
    assert TilingConfig.model_validate(one.model_dump()) == one
