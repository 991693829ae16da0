from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cohort.table import read_cohort
from pipeline.columnar import Columnar
from pipeline.errors import StorageError
from pipeline.tracking.tracker import Tracker
from pipeline.workflow.stage import Record, Workspace, gone_from, slide_tags
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

    shutil.move(Path(pairs[1][1].uri).parent / "catalogue", tmp_path / "aside")
    assert len(space.stored("test")) == 2, "stages that are not to work share one look at the catalogue"
    space.look_again()
    with pytest.raises(StorageError, match="no committed slide"):
        space.stored()
    shutil.move(tmp_path / "aside", Path(pairs[1][1].uri).parent / "catalogue")
    space.look_again()

    (Path(pairs[1][1].uri) / "slide.json").unlink()
    with pytest.raises(StorageError, match="no committed slide"):
        space.stored()


def test_keys_come_from_the_ledger_and_slides_of_a_file_stay_columns(tmp_path: Path) -> None:
    config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / "store")})
    pairs = store_slides(write_cohort(tmp_path, ["no", "yes", "no"]), tmp_path / "store", config)
    lines = [
        f"{slide.slide_id},{slide.uri},{split}"
        for (slide, _), split in zip(pairs, ["val", "train", "val"], strict=True)
    ]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,split", *lines, "bad,bad.png,val"]))
    keys = {slide.slide_id: stored.key for slide, stored in pairs}
    ledger = {"status": ["s"] * 4, "slide_id": [*keys, "bad"], "key": [*keys.values(), None]}
    pq.write_table(pa.table(ledger), tmp_path / "slides.parquet")
    record = Record("tile", "f", {"ledger_slides": str(tmp_path / "slides.parquet")}, {}, {})
    assert record.keys == keys
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        StorageError, match=r"half\.parquet: no ledger of slides \(.*delete it, and `tile` writes it anew"
    ):
        _ = Record("tile", "f", {"ledger_slides": str(tmp_path / "half.parquet")}, {}, {}).tiled
    cohort = read_cohort(str(tmp_path / "cohort.csv"))
    found = Workspace(config, cohort, _none, lambda: None, {}, {"tile": record}).stored("val")
    assert isinstance(found, Columnar)
    assert pickle.loads(pickle.dumps(found)) == [
        (cohort.slides[number], stored) for number, (_, stored) in enumerate(pairs) if number != 1
    ]
    assert (
        gone_from("store", record.tiled, lambda keys: keys.to_pylist()[1:])
        == "2 slides are gone from the store: s1, s2"
    )


def test_slides_cut_by_another_spec_are_refused(tmp_path: Path) -> None:
    config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / "store")})
    ((slide, stored),) = store_slides(write_cohort(tmp_path, ["no"]), tmp_path / "store", config)
    other = small_config(storage=config.storage.model_dump(), tiling={"patch_px": 16, "mpp": None})
    shutil.copytree(tmp_path / "store" / config.tiling.fingerprint(), tmp_path / "store" / other.tiling.fingerprint())
    space = Workspace(other, write_cohort(tmp_path, ["no"]), _none, lambda: None, {})
    space.records["tile"] = Record("tile", "f", {}, {}, {"keys": {slide.slide_id: stored.key}})
    with pytest.raises(StorageError, match=rf"cut by another tiling spec \({config.tiling.fingerprint()}\).*run again"):
        space.stored()
