"""Two workers that stream, against two that read the store: one fit each on Ray Train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.bags.sources import Source
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.training.driver import train
from tests.pipeline.bags.test_streamed import stream_slides
from tests.pipeline.small import small_config, store_slides, write_cohort

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(300)]


def _config(root: Path, source: str, workers: object) -> Config:
    settings = {"epochs": 2, "batch_size": 3, "warmup_epochs": 1, "shard_above": None, "source": source}
    cluster = {"workers": workers, "cpus_per_worker": 0.5, "max_failures": 0, "start_timeout_s": 5}
    tiling: dict[str, Any] = {"patch_px": 32, "mpp": None, "min_tissue": 0.5, "cpus": 0.5}
    return small_config(storage={"root": str(root)}, train=settings, cluster=cluster, tiling=tiling)


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracking(mlflow_uri, "stream", str(tmp_path_factory.mktemp("artifacts")))


def test_streamed_slides_train_the_same_model(ray_session: None, tracker: Tracker, tmp_path: Path) -> None:
    """Bit for bit; `[2, 2]` is elastic to Ray, and sums in the order of a fixed two."""
    cohort = write_cohort(tmp_path, ["no", "yes"] * 3 + ["no"])
    spec = _config(tmp_path, "store", 2).tiling
    stored = store_slides(cohort, tmp_path / "store", _config(tmp_path, "store", 2))
    streamed = list(zip(cohort.slides, stream_slides(cohort, tmp_path / "store", spec), strict=True))
    runs: list[tuple[str, object, list[tuple[CohortSlide, Source]]]] = [
        ("store", 2, list(stored)),
        ("stream", [2, 2], list(streamed)),
    ]
    weights = []
    for source, workers, slides in runs:
        run_id = tracker.start_run(source)
        done = train(_config(tmp_path / source, source, workers), slides[:5], slides[5:], "aa", tracker, run_id)
        assert len(tracker.client.get_metric_history(run_id, "loss")) == 4
        assert tracker.client.get_metric_history(run_id, "device_wait")
        weights.append(load_file(Path(done.checkpoint) / "weights.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
