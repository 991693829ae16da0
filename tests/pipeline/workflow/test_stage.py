from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.tracking.tracker import Tracker
from pipeline.workflow.stage import Record, Workspace, slide_tags
from tests.pipeline.small import small_config, store_slides, write_cohort


def _none() -> Tracker:
    raise AssertionError("nothing is logged here")


def test_a_workspace_opens_the_committed_slides_of_a_split_in_the_cohorts_order(tmp_path: Path) -> None:
    config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / "store")})
    cohort = write_cohort(tmp_path, ["no", "yes", "no"])
    pairs = store_slides(cohort, tmp_path / "store", config)
    space = Workspace(config, cohort, _none, lambda: None, {})
    assert slide_tags(space) == {}
    space.records["tile"] = Record("tile", "f", {}, {}, {"keys": {s.slide_id: p.key for s, p in pairs[:0:-1]}})
    assert [(slide.slide_id, source.key) for slide, source in space.stored("test")] == [
        (slide.slide_id, stored.key) for slide, stored in pairs[1:]
    ]
    assert space.stored("train") == []
    assert len(slide_tags(space)["slide_keys_digest"]) == 16

    (Path(pairs[1][1].uri) / "slide.json").unlink()
    with pytest.raises(StorageError, match="no committed slide"):
        space.stored()


def test_slides_cut_by_another_spec_are_refused(tmp_path: Path) -> None:
    config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / "store")})
    ((slide, stored),) = store_slides(write_cohort(tmp_path, ["no"]), tmp_path / "store", config)
    other = small_config(storage=config.storage.model_dump(), tiling={"patch_px": 16, "mpp": None})
    shutil.copytree(tmp_path / "store" / config.tiling.fingerprint(), tmp_path / "store" / other.tiling.fingerprint())
    space = Workspace(other, write_cohort(tmp_path, ["no"]), _none, lambda: None, {})
    space.records["tile"] = Record("tile", "f", {}, {}, {"keys": {slide.slide_id: stored.key}})
    with pytest.raises(StorageError, match=rf"cut by another tiling spec \({config.tiling.fingerprint()}\).*run again"):
        space.stored()
