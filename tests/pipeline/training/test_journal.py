from __future__ import annotations

import io
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.bags.sources import Source
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.training.journal import Journal, contact_sheet
from tests.pipeline.small import small_config, store_slides, write_cohort


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "journal", str(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("slides")
    config = small_config()
    return [source for _, source in store_slides(write_cohort(folder, ["no", "yes"]), folder / "store", config)]


def _losses(tracker: Tracker, run_id: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracker.client.get_metric_history(run_id, "loss")]


def test_steps_done_again_are_stored_once(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    with Journal(tracker, run_id) as first:
        for step in (1, 2, 3):
            first.add(step, {"loss": step / 10, "lr": 1.0})
        first.add(3, {"epoch": 1.0, "train_loss": 0.2})
    with Journal(tracker, run_id) as second:
        for step in (3, 4):
            second.add(step, {"loss": step / 10, "lr": 1.0})
        second.add(3, {"epoch": 1.0, "train_loss": 0.2})
        second.add(4, {"epoch": 2.0, "train_loss": 0.4})
    assert _losses(tracker, run_id) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [m.step for m in tracker.client.get_metric_history(run_id, "train_loss")] == [3, 4]


def test_rows_that_a_killed_process_had_not_sent_are_sent_by_the_next(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    killed = Journal(tracker, run_id)  # its thread never runs
    for step in (1, 2):
        killed.add(step, {"loss": float(step), "lr": 1.0})
    tracker.log_rows(run_id, killed.unsent[:1])  # it was killed before it learnt that this one had come through
    with Journal(tracker, run_id, killed.unsent) as second:
        assert [step for step, _, _ in second.unsent] == [2]
        second.add(3, {"loss": 3.0, "lr": 1.0})
    assert _losses(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_an_equal_row_sent_twice_is_stored_once(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    row = (1, 1_700_000_000_000, {"loss": 0.5})
    tracker.log_rows(run_id, [row])
    tracker.log_rows(run_id, [row])
    assert _losses(tracker, run_id) == [(1, 0.5)]


def test_a_store_that_is_away_costs_no_row_and_no_picture(
    tracker: Tracker, sources: list[Source], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.training.journal._PERIOD_S", 0.01)
    run_id = tracker.start_run("train")
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    with sqlite3.connect(database) as store, Journal(tracker, run_id) as journal:
        store.execute("ALTER TABLE metrics RENAME TO away")
        store.commit()
        journal.show(1, [(sources[0], torch.tensor([0]))])
        journal.add(1, {"loss": 0.5, "lr": 1.0})
        while "metrics wait for MLflow" not in caplog.text:
            pass
        assert [step for step, _, _ in journal.unsent] == [1]
        store.execute("ALTER TABLE away RENAME TO metrics")
        store.commit()
    store.close()
    assert _losses(tracker, run_id) == [(1, 0.5)]
    assert len(tracker.client.list_artifacts(run_id, "images")) == 2  # MLflow keeps a small one beside it


def test_a_contact_sheet_shows_each_slides_patches_in_a_row(sources: list[Source]) -> None:
    sheet = np.asarray(contact_sheet([(sources[0], torch.tensor([3, 1])), (sources[1], torch.arange(9))]))
    assert sheet.shape == (128, 512, 3)
    (payload,) = sources[0].payloads(np.array([1]))
    expected = np.asarray(Image.open(io.BytesIO(payload)).resize((64, 64)))
    assert np.array_equal(sheet[:64, 64:128], expected)
    assert (sheet[:64, 128:] == 255).all()
    assert (sheet[64:, 448:] < 255).any()


@dataclass(frozen=True)
class Gone:
    """A source whose patches cannot be read."""

    def payloads(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        from pipeline.errors import StorageError

        raise StorageError("cannot read it: gone")


def test_pictures_are_logged_by_epoch_and_their_failure_is_a_warning(
    tracker: Tracker, sources: list[Source], caplog: pytest.LogCaptureFixture
) -> None:
    run_id = tracker.start_run("train")
    with Journal(tracker, run_id) as journal:
        journal.show(2, [(sources[0], torch.tensor([0]))])
        journal.show(3, [(Gone(), torch.tensor([0]))])  # type: ignore[list-item]
    images = [file.path for file in tracker.client.list_artifacts(run_id, "images")]
    assert len([path for path in images if "selected_patches+step+2" in path]) == 2
    assert "no picture of epoch 3's patches (cannot read it: gone)" in caplog.text
