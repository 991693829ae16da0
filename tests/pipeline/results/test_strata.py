from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.inference.metrics import auc
from pipeline.inference.prediction import load_model
from pipeline.results.evaluate import TaskResult, evaluate
from pipeline.results.strata import FEW, MOST, Stratum, strata
from tests.pipeline.small import small_config, store_slides, write_cohort, write_model
from tests.pipeline.sweep.made import made_cohort


def of_slides(folder: Path, labels: list[str], extra: list[dict[str, str]]) -> TaskResult:
    """Slides of a patient each, with more columns."""
    config = small_config()
    pairs = store_slides(write_cohort(folder, labels), folder / "store", config)
    slides = [
        (replace(slide, patient_id=slide.slide_id, extra=columns), stored)
        for (slide, stored), columns in zip(pairs, extra, strict=True)
    ]
    model, _ = load_model(write_model(folder, config))
    (task,) = evaluate(model, config, slides).tasks
    return task


def test_a_column_of_few_values_is_a_stratum_and_an_id_is_not(tmp_path: Path) -> None:
    sites = ["north"] * FEW + ["south"] * (FEW - 1)
    labels = ["yes" if number % 3 else "no" for number in range(len(sites))]
    extra = [{"site": site, "barcode": str(number), "lab": "one"} for number, site in enumerate(sites)]
    task = of_slides(tmp_path, labels, extra)
    north, south = task.strata
    expected = auc(task.values[:FEW, 1], task.truth[:FEW] == 1)
    assert north.measures is not None
    assert north.measures["auc"] == pytest.approx(expected)
    assert north == Stratum("site", "north", task.task.name, FEW, FEW, north.measures)
    assert south == Stratum("site", "south", task.task.name, FEW - 1, FEW - 1, None)


def test_a_group_of_one_class_has_an_accuracy_and_no_auc(tmp_path: Path) -> None:
    labels = ["yes"] * FEW + ["no", "yes"] * FEW
    extra = [{"scanner": "a" if number < FEW else "b"} for number in range(len(labels))]
    first, second = of_slides(tmp_path, labels, extra).strata
    assert first.measures is not None
    assert np.isnan(first.measures["auc"])
    assert 0 <= first.measures["accuracy"] <= 1
    assert second.measures is not None
    assert not np.isnan(second.measures["auc"])


def test_only_slides_among_those_asked_for_are_counted() -> None:
    slides = made_cohort(97).slides
    y = np.array([float(slide.labels["tumour"] == "yes") for slide in slides])
    p = np.random.default_rng(2).random(97)
    among = np.arange(97) != 5
    task = small_config().tasks[0]
    found = {part.value: part for part in strata(slides, task, np.stack([1 - p, p], axis=1), y, 5, among)}
    assert list(found) == ["a", "b", "c"]
    assert (found["c"].slides, found["c"].patients, found["c"].measures) == (3, 2, None)
    for site in "ab":
        inside = among & np.array([slide.extra["site"] == site for slide in slides])
        measures = found[site].measures
        assert measures is not None
        assert measures["auc"] == pytest.approx(auc(p[inside], y[inside] == 1))
        assert found[site].slides == inside.sum()
    many = [replace(slide, extra={"day": str(n % (MOST + 1))}) for n, slide in enumerate(slides)]
    assert strata(many, task, np.stack([1 - p, p], axis=1), y) == []
