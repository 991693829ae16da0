"""What is said when a run's folder, with MLflow's files in it, is not where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking.places import missing
from pipeline.tracking.registry import fetch, register_model
from pipeline.tracking.tracker import connect, open_tracking
from tests.pipeline.small import small_config, write_model


@pytest.mark.slow
def test_a_moved_run_says_where_it_was_and_how_to_link_it(tmp_path: Path) -> None:
    old, new = tmp_path / "my run", tmp_path / "moved"
    old.mkdir()
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model", small_config())
    tracker = open_tracking(f"sqlite:///{old}/mlflow.db", "small", f"{old}/artifacts")
    with tracker.run("register") as run_id:
        version = register_model(tracker, "small", folder, run_id, tags={}, metrics={}, example_uri="a.svs")
    old.rename(new)
    uri = f"sqlite:///{new}/mlflow.db"
    link = f"{old} is {new} now; move it back, or link it: ln -s {new} '{old}'"

    with pytest.raises(TrackingError) as caught:
        fetch(connect(uri), "models:/small/1", tmp_path / "out")
    assert str(caught.value).startswith(
        f"models:/small/1: MLflow at {uri} keeps these files at {old}/artifacts/models/"
    )
    assert str(caught.value).endswith(f", which is gone: {link}")

    with pytest.raises(TrackingError) as caught:
        open_tracking(uri, "small", f"{new}/artifacts")
    assert str(caught.value) == (
        f"experiment 'small': MLflow at {uri} keeps these files at {old}/artifacts, which is gone: {link}, or "
        "set tracking.experiment to another name"
    )
    assert not old.exists()  # where MLflow would begin anew, beside the root

    old.symlink_to(new)
    (tmp_path / "out").mkdir()
    assert fetch(connect(uri), "models:/small/1", tmp_path / "out")[0].version == version.version
    assert open_tracking(uri, "small", f"{new}/artifacts").experiment_id == tracker.experiment_id


def test_files_on_a_server_or_in_a_bucket_are_not_looked_for() -> None:
    for place in ("s3://bucket/a", "mlflow-artifacts:/1/a", "dbfs:/a"):
        assert missing("http://server", place) is None


def test_a_folder_that_is_gone_without_a_trace(tmp_path: Path) -> None:
    place = tmp_path / "a?b #1" / "x"
    expected = f"MLflow at http://server keeps these files at {place}, which is gone; bring it back"
    assert missing("http://server", place.as_uri()) == expected
    assert missing(f"sqlite:///{tmp_path}/mlflow.db", str(place)) == expected.replace(
        "http://server", f"sqlite:///{tmp_path}/mlflow.db"
    )
    place.mkdir(parents=True)
    assert missing("http://server", place.as_uri()) is None
