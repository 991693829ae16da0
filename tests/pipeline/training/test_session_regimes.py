"""Whole runs, from stored patches to a checkpoint that predicts, under regimes that single modules do not meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.cohort.labels import Label
from pipeline.inference.prediction import load_model
from pipeline.results.evaluate import evaluate
from pipeline.tracking.tracker import open_tracking
from pipeline.training.ranks import Ranks
from pipeline.training.session import Job, run_session
from tests.pipeline.small import small_config, store_slides, write_cohort

TASKS = [
    {"name": "tumour", "column": "label", "classes": ["no", "yes"], "class_weights": "balanced"},
    {"name": "finds", "column": "f", "kind": "multilabel", "classes": ["x", "y"]},
    {"name": "age", "column": "a", "kind": "regression", "mean": 60, "std": 10},
    {"name": "death", "column": "t", "kind": "survival", "event_column": "e", "bins": [6, 24]},
]
NET = {"encoder": {"stages": 2}, "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16}}
FINETUNE = {
    "bounded": True, "norm": "group", "grad_chunk": 7, "micro_batch": 2, "freeze_encoder_epochs": 1,
    "encoder_lr": 1e-4, "sampling": "balanced", "stain_jitter": 0.05, "keep_best": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({**NET, "select": {"memory": 5, "chunk": 7}}, FINETUNE),
        (
            {**NET, "select": {"mode": "every"}, "aggregator": {"pool": "gated", "hidden_dim": 8}},
            {"freeze_encoder": True},
        ),
    ],
    ids=["fine-tuning", "frozen ABMIL"],
)
@pytest.mark.slow
def test_four_kinds_of_task_train_and_the_result_is_evaluated(
    model: dict[str, object], train: dict[str, object], tmp_path: Path, mlflow_uri: str
) -> None:
    settings = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "validate_every": 1, **train}
    config = small_config(tasks=TASKS, model=model, train=settings, cluster={"cpus_per_worker": 1})
    cohort = write_cohort(tmp_path, ["no", "yes"] * 4)
    others: list[dict[str, Label | None]] = [
        {"finds": "x;y", "age": 61.0, "death": "3.0"},
        {"finds": "-", "age": None, "death": "8.0+"},
        {"finds": "y", "age": 45.0, "death": None},
        {"finds": None, "age": 70.0, "death": "30.0"},
    ] * 2
    slides = tuple(
        replace(slide, labels={**slide.labels, **more}) for slide, more in zip(cohort.slides, others, strict=True)
    )
    stored = store_slides(replace(cohort, slides=slides), tmp_path / "store", config)
    tracker = open_tracking(mlflow_uri, "regimes", str(tmp_path / "artifacts"))
    run_id = tracker.start_run("train")
    job = Job(config, tuple(stored[:4]), tuple(stored[4:]), "plan", str(tmp_path / "run"), tracker, run_id)
    done = run_session(job, Ranks(), torch.device("cpu"), None)
    assert (done.epoch, done.is_last) == (2, True)
    assert {"val_loss", "val_score", "val_auc_tumour", "val_r2_age", "val_c_index_death"} <= set(done.metrics)
    kept = tmp_path / "run" / (done.best or done.name)
    network, read = load_model(kept)
    result = evaluate(network, read, stored[4:])
    assert result.metrics["test_mae_age"] == pytest.approx(done.metrics["val_mae_age"]) or done.best != done.name
    assert len(result.predictions.to_pydict()["death_24"]) == 4
