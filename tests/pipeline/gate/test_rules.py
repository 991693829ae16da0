from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.config.data import TaskConfig
from pipeline.config.release import (
    CalibrationRule,
    DriftRule,
    FloorRule,
    GateConfig,
    LostRule,
    NoWorseRule,
    ResourcesRule,
    StrataRule,
)
from pipeline.gate.evidence import Evidence
from pipeline.gate.rules import Judged, Outcome, outcomes, problems
from tests.pipeline.gate.made import SLIDES, TASK, evidence, finding, predictions, scores


def _outcomes(gate: GateConfig, **changes: Any) -> list[Outcome]:
    return list(outcomes(gate, Judged(evidence(gate, **changes))))


def _one(gate: GateConfig, **changes: Any) -> Outcome:
    (found,) = _outcomes(gate, **changes)
    return found


@pytest.mark.parametrize(("bound", "outcome"), [(0.9, "met"), (0.999, "not met")])
def test_a_floor_is_on_the_measure_of_the_candidate(bound: float, outcome: str) -> None:
    found = _one(GateConfig(floors=(FloorRule(measure="auc", bound=bound, action="hold"),)))
    assert (found.outcome, found.action, found.figures["bound"]) == (outcome, "hold", bound)
    held = np.arange(SLIDES) % 3 == 0
    given = np.array(scores(0.15))
    pairs = (given[held][:, None] > given[~held][None, :]).mean()
    assert found.figures["value"] == pytest.approx(pairs, abs=1e-8)


def _regression(error: float) -> Evidence:
    task = TaskConfig(name="age", column="age", kind="regression", classes=())
    found = evidence(
        GateConfig(floors=(FloorRule(measure="mae", bound=2.0),), no_worse=NoWorseRule(measure="mae", least=10))
    )
    plain = found.plain()
    plain["tasks"] = [task.model_dump(mode="json")]
    for number, slide in enumerate(plain["slides"]):
        slide["labels"] = {"age": float(number)}
    for name, off in (("candidate", error), ("champion", 1.0)):
        plain[name]["values"] = {"age": [[number + off] for number in range(SLIDES)]}
    from pipeline.gate.evidence import parse

    return parse(plain)


@pytest.mark.parametrize(
    ("error", "floor", "worse"), [(0.5, "met", "met"), (1.5, "met", "not met"), (3.0, "not met", "not met")]
)
def test_of_an_error_less_is_better(error: float, floor: str, worse: str) -> None:
    found = _regression(error)
    said = list(outcomes(GateConfig.model_validate(found.gate), Judged(found)))
    assert [one.outcome for one in said] == [floor, worse]
    assert said[1].figures["difference"] == pytest.approx(1.0 - error)


def test_no_worse_is_shown_by_resamples_of_patients_that_both_models_share() -> None:
    """Two models of equal AUC whose errors lie on other slides: the margin must cover what chance does."""
    rule = NoWorseRule(margin=0.3, resamples=500, least=10)
    wide = _one(GateConfig(no_worse=rule), candidate=predictions("2", scores(0.2, seed=9)))
    assert wide.outcome == "met"
    narrow = NoWorseRule(margin=0.001, resamples=500, least=10)
    assert _one(GateConfig(no_worse=narrow), candidate=predictions("2", scores(0.2, seed=9))).outcome == "not met"
    assert wide.figures["patients"] == 31
    assert -0.3 < float(wide.figures["low"] or 0) < float(wide.figures["difference"] or 0)


def test_two_models_that_never_differ_are_as_good_as_the_number_of_patients_shows() -> None:
    same = {"candidate": predictions("2", scores(0.0)), "champion": predictions("1", scores(0.0))}
    found = _one(GateConfig(no_worse=NoWorseRule(margin=0.02, least=10)), **same)
    assert (found.outcome, found.action) == ("too few", "hold")
    assert (found.figures["difference"], found.figures["shown"]) == (0, 0)
    assert "but 15 patients of the rarer class are too few to judge by: a loss that sits in few of them" in found.says
    assert found.says.endswith("may not show; with 133 it would")
    assert _one(GateConfig(no_worse=NoWorseRule(margin=0.2, least=10)), **same).outcome == "met"


def test_few_patients_are_their_own_outcome() -> None:
    found = _one(GateConfig(no_worse=NoWorseRule(margin=0.3, least=32)))
    assert (found.outcome, found.action) == ("too few", "hold")
    assert "31 patients with a label of tumour are too few" in found.says


def test_a_floor_on_few_patients_holds() -> None:
    rule = FloorRule(measure="auc", bound=0.5, least=32)
    found = _one(GateConfig(floors=(rule,)))
    assert (found.outcome, found.action) == ("too few", "hold")
    assert _one(GateConfig(floors=(rule.model_copy(update={"least": 31}),))).outcome == "met"


@pytest.mark.parametrize("few", ["pass", "hold"])
def test_strata_have_bounds_of_their_own_and_small_ones_are_named(few: Any) -> None:
    rule = StrataRule(columns=("site",), measure="auc", bound=0.95, few=few)
    by_site = {one.rule.split()[1]: one for one in _outcomes(GateConfig(strata=(rule,)))}
    assert by_site["site=big"].outcome == "met"
    small = by_site["site=small"]
    assert (small.outcome, small.action, small.figures["patients"]) == ("too few", few, 7)
    asked = StrataRule(columns=("site",), measure="auc", bound=0.95, least=7)
    turned = scores(0.15)
    turned[:7] = [1 - score for score in turned[:7]]
    of_seven = {
        one.rule.split()[1]: one.outcome
        for one in _outcomes(GateConfig(strata=(asked,)), candidate=predictions("2", turned))
    }
    assert of_seven == {"site=big": "met", "site=small": "not met"}


def test_calibration_resources_and_what_was_lost() -> None:
    assert _one(GateConfig(calibration=CalibrationRule(most=0.4))).outcome == "met"
    sure = [0.99 if score < 0.5 else 0.01 for score in scores(0.0)]
    assert (
        _one(GateConfig(calibration=CalibrationRule(most=0.4)), candidate=predictions("2", sure)).outcome == "not met"
    )
    limits = GateConfig(resources=ResourcesRule(seconds=0.4, memory_gib=2.0))
    assert [(one.rule, one.outcome) for one in _outcomes(limits)] == [
        ("resources seconds", "not met"),
        ("resources memory", "met"),
    ]
    lost = GateConfig(lost=LostRule(patches=0.01, slides=0.01))
    found = _outcomes(lost, lost={"patches": 0.004, "slides": 0.02})
    assert [(one.rule, one.outcome, one.action) for one in found] == [
        ("lost patches", "met", "hold"),
        ("lost slides", "not met", "hold"),
    ]


def test_drift_needs_a_small_p_and_a_large_effect_and_enough_slides() -> None:
    gate = GateConfig(drift=DriftRule(alpha=0.01, effect=0.5, least=8))
    assert list(outcomes(gate, Judged(evidence(gate)))) == []
    calm = (finding("eosin", 0.0001, 0.4), finding("mpp", 0.02, 0.9), finding("rare", 0.0001, 0.9, n_new=7))
    assert _one(gate, drift=calm).outcome == "met"
    found = _one(gate, drift=(*calm, finding("brightness", 0.004, 0.8)))
    assert (found.outcome, found.figures) == ("not met", {"brightness p": 0.004, "brightness effect": 0.8})
    few = _one(gate, drift=(finding("eosin", 0.0001, 0.9, n_new=7),))
    assert (few.outcome, few.action) == ("too few", "pass")


def test_rules_that_do_not_go_with_the_tasks_are_told_all_at_once() -> None:
    age = TaskConfig(name="age", column="age", kind="regression", classes=())
    gate = GateConfig(
        floors=(FloorRule(measure="mae", bound=1.0), FloorRule(measure="auc", bound=0.5, task="grade")),
        no_worse=NoWorseRule(measure="r2", task="age", least=10),
        strata=(StrataRule(columns=("site",), measure="auc", bound=0.5, task="age"),),
        calibration=CalibrationRule(task="age"),
    )
    assert problems(gate, [TASK, age], ["scanner"]) == [
        "gate.strata.0.columns: the cohort has no column 'site'; it has scanner",
        "gate.floors.0.measure: task tumour has no 'mae'; it has auc, accuracy",
        "gate.floors.1.task: there is no task 'grade'; it is one of tumour, age",
        "gate.strata.0.measure: task age has no 'auc'; it has r2, mae",
        "gate.calibration: a regression task has no probabilities of classes; name another task",
    ]
