"""Real fits on Ray Train; each costs about 12 seconds, so they are few and marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cohort import CohortSlide
from pipeline.config import Config
from pipeline.errors import ResourceError, StageError
from pipeline.patches import StoredSlide
from pipeline.tracking import Tracker, open_tracking
from pipeline.train import Trained, _process_group, train
from tests.pipeline.small import small_config, store_slides, write_cohort

pytestmark = [pytest.mark.slow, pytest.mark.ray]

Slides = list[tuple[CohortSlide, StoredSlide]]


def _config(root: Path, workers: int = 1, **train_: object) -> Config:
    settings = {"epochs": 3, "batch_size": 3, "warmup_epochs": 1, "augment": False, **train_}
    cluster = {"workers": workers, "cpus_per_worker": 0.5, "start_timeout_s": 2, "max_failures": 0}
    return small_config(storage={"root": str(root)}, train=settings, cluster=cluster)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    folder = tmp_path_factory.mktemp("cohort")
    return store_slides(write_cohort(folder, ["no", "yes"] * 3 + ["no"]), folder / "store", small_config())


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "train", str(tmp_path_factory.mktemp("artifacts")))


def _train(config: Config, slides: Slides, tracker: Tracker, fingerprint: str = "aa") -> tuple[Trained, str]:
    run_id = tracker.start_run("train")
    return train(config, slides[:5], slides[5:], fingerprint, tracker, run_id), run_id


def test_a_run_resumes_from_its_last_checkpoint_as_if_uninterrupted(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    whole, run_id = _train(_config(tmp_path / "whole"), slides, tracker)
    history = tracker.client.get_metric_history(run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    assert whole.metrics["epoch"] == 3
    assert "val_auc_tumour" in whole.metrics

    again, run_id = _train(_config(tmp_path / "whole"), slides, tracker)
    assert again == whole
    assert tracker.client.get_metric_history(run_id, "loss") == []

    with pytest.raises(StageError, match="another plan"):
        train(_config(tmp_path / "whole"), slides[:4], slides[5:], "aa", tracker, tracker.start_run("train"))


def test_two_workers_train_on_every_slide_and_keep_equal_weights(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    trained, run_id = _train(_config(tmp_path, workers=2), slides, tracker)
    assert len(tracker.client.get_metric_history(run_id, "loss")) == 6
    weights = load_file(Path(trained.checkpoint) / "weights.safetensors")
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


def test_what_can_never_be_had_is_refused(ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 16 x \(0.5 CPUs"):
        _train(_config(tmp_path, workers=16), slides, tracker)


def test_ranks_wait_while_the_first_one_validates(tmp_path: Path) -> None:
    """Large slides take it hours; the default of 30 minutes would end the run, again and again."""
    group = _process_group(_config(tmp_path).cluster)
    assert (group.backend, group.timeout_s) == ("gloo", 24 * 3600)


def test_a_diverging_loss_reaches_the_driver_as_itself(
    ray_session: None, slides: Slides, tracker: Tracker, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"at step .* lower train.lr"):
        _train(_config(tmp_path, lr=1e30, clip_norm=None, warmup_epochs=0), slides, tracker, "bb")
