from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score

from pipeline.cohort.labels import stratum, truth
from pipeline.cohort.table import Cohort
from pipeline.errors import StageError
from pipeline.inference.measured import measured
from pipeline.inference.prediction import load_model
from pipeline.inference.resampling import draw_plan
from pipeline.results.evaluate import Evaluation, evaluate, write_cases
from pipeline.results.report import render_report
from tests.pipeline.small import small_config, store_slides, write_cohort, write_model

LABELS = ("no", "yes", "yes", "no", "no", "yes", None)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("slides"), LABELS)


@pytest.fixture(scope="module")
def evaluation(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    config = small_config()
    model, _ = load_model(write_model(tmp_path_factory.mktemp("model"), config))
    return evaluate(model, config, store_slides(cohort, tmp_path_factory.mktemp("store"), config), {"tumour": 0.45})


def test_metrics_are_named_after_the_split_and_agree_with_the_table(evaluation: Evaluation) -> None:
    assert set(evaluation.metrics) == {
        "test_auc", "test_auc_low", "test_auc_high", "test_accuracy", "test_accuracy_low",
        "test_accuracy_high", "test_slides", "test_patients", "test_average_precision", "test_balanced_accuracy",
        "test_brier", "test_calibration_error", "test_f1", "test_kappa", "test_log_loss", "test_sensitivity",
        "test_specificity", "test_threshold",
    }  # fmt: skip
    table = evaluation.predictions.to_pandas()
    known = table.dropna(subset=["tumour_label"])
    expected = roc_auc_score(known["tumour_label"] == "yes", known["tumour_yes"])
    assert evaluation.metrics["test_auc"] == pytest.approx(expected)
    assert evaluation.metrics["test_auc_low"] <= expected <= evaluation.metrics["test_auc_high"]
    assert evaluation.metrics["test_accuracy"] == (known["tumour_label"] == known["tumour_predicted"]).mean()
    assert evaluation.metrics["test_patients"] == 4
    assert evaluation.metrics["test_brier"] == pytest.approx(
        brier_score_loss(known["tumour_label"] == "yes", known["tumour_yes"])
    )
    json.dumps(evaluation.metrics, allow_nan=False)


def test_positive_is_called_from_the_threshold_of_other_slides(evaluation: Evaluation) -> None:
    (task,) = evaluation.tasks
    assert task.threshold == evaluation.metrics["test_threshold"] == 0.45
    expected = confusion_matrix(task.truth, task.values[:, 1] >= 0.45, labels=[0, 1])
    np.testing.assert_array_equal(task.confusion_there, expected)
    assert evaluation.metrics["test_sensitivity"] == expected[1, 1] / 3


def test_intervals_are_those_of_a_sweep_of_one(evaluation: Evaluation) -> None:
    """The plan, the measures and their bounds come from one place: the same slides say the same."""
    (task,) = evaluation.tasks
    slides, config = [slide for slide, _ in evaluation.slides], small_config()
    labels = [slide.labels["tumour"] for slide in slides]
    patients = [slide.patient_id for slide in slides]
    plan = draw_plan(patients, [stratum(task.task, label) for label in labels], config.evaluate.bootstrap, config.seed)
    y = np.array([truth(task.task, label) for label in labels])
    values = np.stack([one.values["tumour"] for one in evaluation.found])
    found = measured(task.task, values, y, patients, plan.weights(patients), 0.45)
    assert (task.measures, task.scores) == (found.measures, found.scores)


def test_slides_without_a_label_are_predicted_and_not_measured(evaluation: Evaluation) -> None:
    assert evaluation.predictions.num_rows == 7
    assert evaluation.predictions.column("tumour_label").to_pylist() == list(LABELS)
    (task,) = evaluation.tasks
    assert task.slides.tolist() == [0, 1, 2, 3, 4, 5]
    assert task.confusion is not None
    assert task.confusion.sum() == 6
    assert list(task.roc) == ["yes"]
    assert len(evaluation.found) == 7


def test_several_tasks_average_and_the_first_ones_name_stays(cohort: Cohort, tmp_path: Path) -> None:
    tasks = [
        {"name": "tumour", "column": "label", "classes": ["no", "yes"]},
        {"name": "grade", "column": "g", "kind": "multiclass", "classes": ["a", "b", "c"]},
    ]
    config = small_config(tasks=tasks)
    graded = Cohort(
        cohort.uri,
        tuple(
            type(slide)(slide.slide_id, slide.uri, slide.patient_id, "test", None, {**slide.labels, "grade": grade}, {})
            for slide, grade in zip(cohort.slides, ("a", "b", None, "a", "b", "b", "a"), strict=True)
        ),
    )
    model, _ = load_model(write_model(tmp_path, config))
    result = evaluate(model, config, store_slides(graded, tmp_path / "store", config))
    metrics = result.metrics
    assert metrics["test_auc"] == pytest.approx((metrics["test_auc_tumour"] + metrics["test_auc_grade"]) / 2)
    assert not np.isnan(list(metrics.values())).any()
    assert sorted(result.tasks[1].roc) == ["a", "b"]  # no slide has class c


def test_one_class_only_or_no_slides_is_an_error(tmp_path: Path) -> None:
    config = small_config()
    model, _ = load_model(write_model(tmp_path, config))
    with pytest.raises(StageError, match=r"evaluate: no slide of split 'test'"):
        evaluate(model, config, [])
    same = write_cohort(tmp_path, ("yes", "yes", None))
    with pytest.raises(StageError, match=r"'test' have, for task 'tumour', only class 'yes'; add slides"):
        evaluate(model, config, store_slides(same, tmp_path / "store", config))


def test_a_model_that_gives_no_numbers_is_an_error(cohort: Cohort, tmp_path: Path) -> None:
    """They would be ranked above all numbers."""
    config = small_config()
    model, _ = load_model(write_model(tmp_path, config))
    for parameter in model.heads.parameters():
        parameter.data.fill_(float("nan"))
    slides = store_slides(cohort, tmp_path / "store", config)
    with pytest.raises(StageError, match=f"not finite for {len(slides)} of {len(slides)} slides, such as"):
        evaluate(model, config, slides)


def test_every_kind_of_task_at_once(cohort: Cohort, tmp_path: Path) -> None:
    tasks = [
        {"name": "finds", "column": "f", "kind": "multilabel", "classes": ["x", "y"]},
        {"name": "age", "column": "a", "kind": "regression", "mean": 60, "std": 10},
        {"name": "death", "column": "t", "kind": "survival", "event_column": "e", "bins": [6, 24]},
        {"name": "tumour", "column": "label", "classes": ["no", "yes"]},
    ]
    labels = zip(
        ("x;y", "-", "y", None, "x", "y", "x"),
        (61.5, 40.0, None, 70.0, 55.0, 81.0, 33.0),
        ("3.0", "8.5+", "90.0", "11.0", None, "2.0+", "7.0"),
        strict=True,
    )
    slides = tuple(
        replace(slide, labels={**slide.labels, "finds": finds, "age": age, "death": death})
        for slide, (finds, age, death) in zip(cohort.slides, labels, strict=True)
    )
    config = small_config(tasks=tasks)
    model, _ = load_model(write_model(tmp_path, config))
    mixed = Cohort(cohort.uri, slides)
    result = evaluate(model, config, store_slides(mixed, tmp_path / "store", config))
    names = {
        "auc", "auc_low", "auc_high", "accuracy", "accuracy_low", "accuracy_high", "exact_match", "exact_match_low",
        "exact_match_high", "r2", "r2_low", "r2_high", "c_index", "c_index_low", "c_index_high", "slides", "patients",
        "auc_finds", "exact_match_finds", "r2_age", "mae_age", "c_index_death", "auc_tumour", "accuracy_tumour",
    }  # fmt: skip
    further = {
        "spearman_age", "auc_at_6_death", "auc_of_x_finds", "auc_of_y_finds", "f1_finds", "brier_finds",
        "average_precision_finds", "calibration_error_finds", "average_precision_tumour", "balanced_accuracy_tumour",
        "f1_tumour", "kappa_tumour", "log_loss_tumour", "brier_tumour", "calibration_error_tumour",
    }  # fmt: skip
    assert {f"test_{name}" for name in names | further} <= set(result.metrics)
    assert not {name for name in result.metrics if name.endswith(("_low", "_high"))} - {f"test_{n}" for n in names}
    assert not np.isnan(list(result.metrics.values())).any()
    kept = result.calibration()["tasks"]
    ids = {source.key: slide.slide_id for slide, source in result.slides}
    witness = kept["age"]["names"][0][1]
    less = result.calibration({ids[witness]})["tasks"]
    assert witness not in {key for own in less.values() for _, key in own["names"]}
    assert len(less["age"]["said"]) in (3, 4)  # where the patient has another slide, that one tells
    assert write_cases(replace(result, split="val"), str(tmp_path / "none")) == {}
    assert not (tmp_path / "none").exists()
    wrote = json.loads(Path(write_cases(result, str(tmp_path / "cases"))["calibration"]).read_text())
    assert (wrote["split"], wrote["tasks"]["tumour"]["patients"]) == ("test", 3)
    assert all(len(set(names)) == 2 for names in wrote["tasks"]["age"]["names"])
    assert {name: len(own["said"]) for name, own in kept.items()} == {"finds": 4, "age": 4, "tumour": 3}  # patients
    table = result.predictions.to_pydict()
    values = dict(zip(table["age_value"], table["age_label"], strict=True))
    assert [values[said] for (said,) in kept["age"]["said"]] == [came for (came,) in kept["age"]["came"]]
    finds = {(x, y): label for x, y, label in zip(*(table[f"finds_{n}"] for n in ("x", "y", "label")), strict=True)}
    for said, came in zip(kept["finds"]["said"], kept["finds"]["came"], strict=True):
        assert [name in finds[tuple(said)] for name in "xy"] == [one == 1 for one in came]
    assert all(sum(came) == 1 for came in kept["tumour"]["came"])
    assert table["age_label"] == [61.5, 40.0, None, 70.0, 55.0, 81.0, 33.0]
    assert table["age_predicted"] == table["age_value"]
    assert 30 < table["age_value"][0] < 90
    assert table["death_label"][1] == "8.5+"
    assert all(1 >= early >= late >= 0 for early, late in zip(table["death_6"], table["death_24"], strict=True))
    assert {name for label in table["finds_predicted"] for name in label.split(";")} <= {"x", "y", "-"}
    assert result.tasks[0].confusion is None
    result = replace(result, tasks=result.tasks[1:3])  # each picture takes a tenth of a second
    html = render_report(result, config, mixed, {})
    assert html.count("<h2>") == 2 + len(result.tasks)
    for text in ("R²", "Predicted against labelled", "P(after 24)", "8.5+", "61.5", "events: 4, censored: 2"):
        assert text in html, text
