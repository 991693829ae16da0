"""Masks and coordinates beside a slide: found, read, and part of what the slide is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.errors import ConfigError, SlideError, StorageError
from pipeline.ingest.source import version_of
from pipeline.ingest.tiler import store_slide
from pipeline.storage.files import source_version
from pipeline.store.patches import PatchStore
from pipeline.tiling.guide import check_environment, guide_files, guided_version, read_guide
from tests.pipeline.small import small_config, write_slide
from tests.pipeline.tiling.test_interchange import trident
from tests.pipeline.tiling.test_masks import geojson, polygon

TILING = small_config().tiling
H5 = trident()


def rectangle(left: int, right: int) -> bytes:
    return geojson(polygon([[left, 0], [right, 0], [right, 157], [left, 157], [left, 0]]))


@pytest.fixture
def slide(tmp_path: Path) -> CohortSlide:
    write_slide(tmp_path / "s 0.png", 0)
    (tmp_path / "left.geojson").write_bytes(rectangle(0, 100))
    (tmp_path / "cohort.csv").write_text("slide_id,uri,mask\na,s 0.png,left.geojson\nb,s 0.png,\n")
    return read_cohort(str(tmp_path / "cohort.csv")).slides[0]


def test_the_cohort_names_the_mask_and_the_mask_the_patches(slide: CohortSlide, tmp_path: Path) -> None:
    store = PatchStore(str(tmp_path / "store"), TILING.fingerprint())
    keys = []
    for data in (None, rectangle(0, 100), rectangle(100, 211)):
        if data is not None:
            (tmp_path / "left.geojson").write_bytes(data)
        status = store_slide(slide if data else replace(slide, mask=None), TILING, str(tmp_path / "store"))
        assert status.key is not None, status.error
        keys.append(status.key)
    assert len(set(keys)) == 3
    plain, left, right = (store.slide(key).index().x for key in keys)
    assert set(left) == {0, 32, 64}
    assert set(right) == {96, 128, 160}  # 100 to 211; at 96 seven eighths of a patch
    assert set(plain) == {0, 32, 64, 96, 128}


def test_two_masks_of_one_file_are_two_slides_and_both_are_remembered(slide: CohortSlide, tmp_path: Path) -> None:
    (tmp_path / "right.geojson").write_bytes(rectangle(100, 211))
    store = PatchStore(str(tmp_path / "store"), TILING.fingerprint())
    two = [slide, replace(slide, slide_id="right", mask=str(tmp_path / "right.geojson"))]
    made = [store_slide(one, TILING, str(tmp_path / "store")) for one in two]
    assert made[0].key != made[1].key
    assert [store.status(one, version_of(one, TILING)) for one in two] == made


def test_a_changed_mask_is_another_version_of_the_slide(slide: CohortSlide, tmp_path: Path) -> None:
    version = source_version(slide.uri)
    plain = replace(slide, mask=None)
    assert guided_version(plain, TILING, version) == version
    first = guided_version(slide, TILING, version)
    assert first != version
    (tmp_path / "left.geojson").write_bytes(rectangle(0, 90) + b" ")
    assert guided_version(slide, TILING, version) != first


def test_a_mask_that_is_not_there_costs_the_slide_and_is_tried_again(slide: CohortSlide, tmp_path: Path) -> None:
    (tmp_path / "left.geojson").unlink()
    with pytest.raises(StorageError, match="left.geojson"):
        read_guide(slide, TILING)
    status = store_slide(slide, TILING, str(tmp_path / "store"))
    assert (status.key, str(status.reason).partition(":")[0]) == (None, "missing")
    (tmp_path / "left.geojson").write_bytes(rectangle(0, 100))
    assert store_slide(slide, TILING, str(tmp_path / "store")).key


def test_coordinates_are_looked_for_by_id_and_by_file_name(slide: CohortSlide, tmp_path: Path) -> None:
    spec = TILING.model_copy(update={"coords": str(tmp_path / "h5")})
    with pytest.raises(
        SlideError, match=r"none of a~\w{8}_patches.h5, a~\w{8}.h5, a_patches.h5, a.h5, s 0_patches.h5, s 0.h5"
    ):
        guide_files(slide, spec)
    (tmp_path / "h5").mkdir()
    (tmp_path / "h5" / "s 0.h5").write_bytes(trident())
    assert guide_files(slide, spec)[1] == str(tmp_path / "h5" / "s 0.h5")
    (tmp_path / "h5" / "a_patches.h5").write_bytes(trident())
    assert guide_files(slide, spec)[1] == str(tmp_path / "h5" / "a_patches.h5")
    own = replace(slide, coords=str(tmp_path / "h5" / "s 0.h5"))
    assert guide_files(own, spec)[1] == own.coords
    guide = read_guide(own, spec)
    assert guide.mask is not None
    assert guide.coords is not None
    assert guide.digest not in {read_guide(slide, TILING).digest, read_guide(replace(own, mask=None), spec).digest}


@pytest.fixture
def no_h5py(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed: the import fails."""
    monkeypatch.setitem(sys.modules, "h5py", None)


@pytest.mark.parametrize("command", ["tile", "plan", "export"])
@pytest.mark.parametrize("given", ["tiling.coords", "column"])
def test_coordinates_without_h5py_end_before_any_work(
    slide: CohortSlide, tmp_path: Path, no_h5py: None, command: str, given: str
) -> None:
    named = "a.h5" if given == "column" else ""
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,label,coords\na,s 0.png,1,{named}\nb,s 0.png,0,\n")
    root = tmp_path / "root"
    options = [f"cohort.uri={tmp_path / 'cohort.csv'}", f"storage.root={root}", "tiling=image"]
    options += [f"tiling.coords={tmp_path / 'h5'}"] if given == "tiling.coords" else []
    options += ["--out", str(tmp_path / "out")] if command == "export" else []
    done = CliRunner().invoke(app, [command, *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("pip install 'ips-pipeline[interchange]'") == 1
    assert "tiling.coords" in done.stderr
    assert not root.exists()


def test_a_node_without_h5py_ends_the_stage_and_costs_no_slide(
    slide: CohortSlide, tmp_path: Path, no_h5py: None
) -> None:
    (tmp_path / "a.h5").write_bytes(H5)
    with pytest.raises(ConfigError, match="on every node"):
        store_slide(replace(slide, coords=str(tmp_path / "a.h5")), TILING, str(tmp_path / "store"))
    check_environment([slide], TILING)  # a mask alone needs none
