from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StageError
from pipeline.ingest.cohorts import listed
from pipeline.workflow.embed import stages_for
from pipeline.workflow.given import index_features
from pipeline.workflow.stage import Record, Workspace
from tests.pipeline.formats.test_feature_files import VECTORS, N, trident
from tests.pipeline.ingest.test_cohorts import given_config


def space_of(folder: Path, files: dict[str, bytes]) -> Workspace:
    for name, data in files.items():
        (folder / f"{name}.h5").write_bytes(data)
    rows = "".join(f"{name},{name}.h5,no,test\n" for name in files)
    (folder / "cohort.csv").write_text(f"slide_id,features,label,split\n{rows}")
    config = given_config(folder)
    return Workspace(
        config, listed(config, config.tasks), lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {}
    )


def test_files_are_indexed_without_ray_and_opened_for_the_stages_to_come(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"a": trident(), "b": trident(VECTORS + 1)})
    assert [stage.name for stage in stages_for(space.config, "train")] == ["tile", "train"]
    statuses = index_features(space)
    space.records["tile"] = Record("tile", "f", {}, {}, {"keys": {one.slide_id: one.key for one in statuses}})
    (first, a), (_, b) = space.stored("test")
    assert (first.slide_id, first.uri) == ("a", str(tmp_path / "a.h5"))
    rows = np.arange(N)
    assert np.array_equal(a.vectors(rows) + 1, b.vectors(rows))  # type: ignore[union-attr]


def test_several_encoders_in_one_cohort_end_the_stage(tmp_path: Path) -> None:
    wide = np.concatenate([VECTORS, VECTORS], axis=1)
    space = space_of(tmp_path, {"a": trident(), "b": trident(wide)})
    with pytest.raises(StageError, match="features of several encoders in one cohort"):
        index_features(space)
