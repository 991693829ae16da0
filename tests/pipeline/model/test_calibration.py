from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError
from pipeline.model.calibration import (
    CALIBRATION,
    Cases,
    Steps,
    calibration_json,
    chosen,
    conformal_reach,
    intervals,
    read_calibration,
    venn_abers,
)
from tests.oracle import isotonic_by_means

BINARY = TaskConfig(name="t", column="label", classes=("no", "yes"))
NUMBER = TaskConfig(name="age", column="age", kind="regression")
CASE = st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), st.booleans())


@given(st.lists(CASE, max_size=12), CASE)
def test_the_ends_are_two_isotonic_regressions_at_the_new_slide(
    cases: list[tuple[float, bool]], new: tuple[float, bool]
) -> None:
    said, came = np.array([p for p, _ in cases]), np.array([float(y) for _, y in cases])
    ends = []
    for truth in (0.0, 1.0):
        pairs = [*zip(said.tolist(), came.tolist(), strict=True), (new[0], truth)]
        outputs = sorted({p for p, _ in pairs})
        groups = [[y for p, y in pairs if p == one] for one in outputs]
        fitted = isotonic_by_means([sum(own) / len(own) for own in groups], [float(len(own)) for own in groups])
        ends.append(fitted[outputs.index(new[0])])
    assert venn_abers(said, came, new[0]) == pytest.approx(tuple(ends), abs=1e-12)
    steps = Steps(said, came)  # asked of other outputs before, among them those between two known ones
    for other in (-1.0, 0.3, 0.5, 2.0, new[0], new[0]):
        assert steps.at(other) == venn_abers(said, came, other)
    low, high = venn_abers(1 - said, 1 - came, 1 - new[0])
    assert (1 - high, 1 - low) == pytest.approx(tuple(ends), abs=1e-12)
    assert 0 <= ends[0] < ends[1] <= 1


def test_nothing_known_says_nothing_and_more_cases_say_more() -> None:
    assert venn_abers(np.array([]), np.array([]), 0.99) == (0.0, 1.0)
    widths = []
    for n in (10, 100, 1000):
        said = np.linspace(0.01, 0.99, n)
        low, high = venn_abers(said, (said > 0.5).astype(float), 0.9)
        widths.append(high - low)
    assert widths[0] > 5 * widths[1] > 25 * widths[2]


def test_the_end_of_the_truth_is_a_calibrated_probability() -> None:
    """Of 6,000 draws of 40 cases and a slide, by a model that says 0.98 where it should say 0.73."""
    generator = np.random.default_rng(0)
    share = generator.uniform(size=(6000, 41))
    said = 1 / (1 + (share / (1 - share)) ** -4.0)
    came = (generator.uniform(size=share.shape) < share).astype(float)
    ends = np.array([venn_abers(p[:-1], y[:-1], p[-1]) for p, y in zip(said, came, strict=True)])
    truth = came[:, -1]
    true_end = np.where(truth == 1, ends[:, 1], ends[:, 0])
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        there = (true_end >= low) & (true_end <= low + 0.2)
        error = 3 * np.sqrt(0.25 / there.sum())
        assert abs(truth[there].mean() - true_end[there].mean()) < error
    sure = said[:, -1] > 0.97
    assert said[sure, -1].mean() - truth[sure].mean() > 0.08  # the output itself is off
    assert ends[sure, 0].mean() < truth[sure].mean() < ends[sure, 1].mean()


@pytest.mark.parametrize("n", [19, 25, 100])
def test_a_number_lies_within_its_interval_as_often_as_is_said(n: int) -> None:
    """Whatever the errors' distribution is; and not much oftener: (n + 1) * 0.95 is rounded up to a case."""
    errors = np.abs(np.random.default_rng(n).standard_cauchy((4000, n + 1)))
    held = np.mean([one[-1] <= conformal_reach(one[:-1]) for one in errors])
    slack = 3 * np.sqrt(0.95 * 0.05 / len(errors))
    assert 0.95 - slack < held < 0.95 + 1 / (n + 1) + slack


def test_too_few_errors_tell_no_reach() -> None:
    assert conformal_reach(np.ones(18)) is None
    assert conformal_reach(np.arange(19.0)) == 18.0  # the largest
    assert conformal_reach(np.arange(39.0)) == 37.0  # the last but one


def test_intervals_are_by_column_and_survive_the_file(tmp_path: Path) -> None:
    said = np.linspace(0.0, 1.0, 40)
    truth = (said > 0.6).astype(float)
    cases = {
        "t": Cases(np.stack([1 - said, said], axis=1), np.stack([1 - truth, truth], axis=1)),
        "age": Cases(said[:, None], said[:, None] + 2.0),
    }
    (tmp_path / CALIBRATION).write_text(json.dumps(calibration_json(cases)))
    values = {"t_no": 0.25, "t_yes": 0.75, "age_value": 50.0}
    found = intervals([BINARY, NUMBER], read_calibration(tmp_path, [BINARY, NUMBER]), values)
    assert found == intervals([BINARY, NUMBER], cases, values)
    assert found["age_value"] == pytest.approx((48.0, 52.0))
    low, high = found["t_yes"]
    assert found["t_no"] == pytest.approx((1 - high, 1 - low))
    assert intervals([NUMBER], {"t": cases["t"]}, values) == {}


def test_a_patient_is_one_case_and_the_order_tells_nothing() -> None:
    ids, patients = ["a1", "a2", "b1", "c1", "c2"], ["a", "a", "b", "c", "c"]
    found = chosen(ids, patients)
    assert sorted(patients[place] for place in found) == ["a", "b", "c"]
    turned = chosen(ids[::-1], patients[::-1])
    assert [ids[::-1][place] for place in turned] == [ids[place] for place in found]


def test_a_model_without_cases_has_none_and_a_broken_file_is_named(tmp_path: Path) -> None:
    assert read_calibration(tmp_path, [BINARY]) == {}
    for text, why in (("{", "cannot be read"), ('{"version": 2}', "is of version 2, and this release knows 1")):
        (tmp_path / CALIBRATION).write_text(text)
        with pytest.raises(StageError, match=why):
            read_calibration(tmp_path, [BINARY])


def test_a_task_without_cases_says_nothing_and_is_not_written(tmp_path: Path) -> None:
    none, one = Cases(np.empty((0, 2)), np.empty((0, 2))), Cases(np.array([[70.0]]), np.array([[71.0]]))
    whole = calibration_json({"t": none, "age": one})
    assert list(whole["tasks"]) == ["age"]
    empty = {"patients": 0, "said": [], "came": [], "names": []}
    (tmp_path / CALIBRATION).write_text(json.dumps({**whole, "tasks": {**whole["tasks"], "t": empty}}))
    found = read_calibration(tmp_path, [BINARY, NUMBER])
    assert found["t"].said.shape == (0, 2)
    values = {"t_no": 0.25, "t_yes": 0.75, "age_value": 70.0}
    assert intervals([BINARY, NUMBER], found, values) == {"t_no": (0.0, 1.0), "t_yes": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"said": [[0.5], [0.5]]}, "1 outputs and 2 truths, the model has 2"),
        ({"said": [[0.5, 0.5]]}, "2 patients, 1 said, 2 came, 2 names"),
        ({"came": [[0.0, 1.0], [float("nan"), 1.0]]}, "values that are no finite numbers"),
        ({"names": [["a"]]}, "2 patients, 2 said, 2 came, 1 names"),
        ({"said": "x"}, "could not convert"),
    ],
)
def test_cases_that_do_not_fit_together_are_refused(change: dict[str, object], why: str, tmp_path: Path) -> None:
    ends = np.array([[0.0, 1.0], [1.0, 0.0]])
    whole = calibration_json({"t": Cases(ends, ends, (("a",), ("b",)))})
    assert (whole["split"], whole["tasks"]["t"]["patients"]) == ("test", 2)
    (tmp_path / CALIBRATION).write_text(json.dumps(whole))
    assert read_calibration(tmp_path, [BINARY])["t"].names == (("a",), ("b",))
    (tmp_path / CALIBRATION).write_text(json.dumps({**whole, "tasks": {"t": {**whole["tasks"]["t"], **change}}}))
    with pytest.raises(StageError, match=why):
        read_calibration(tmp_path, [BINARY])


def test_a_slide_of_the_cases_does_not_tell_of_itself() -> None:
    said = np.linspace(0.0, 1.0, 40)
    truth = (np.arange(40) % 2).astype(float)
    ends = np.stack([1 - said, said], axis=1), np.stack([1 - truth, truth], axis=1)
    cases = {"t": Cases(*ends, tuple((f"patient{n}", f"slide{n}") for n in range(40)))}
    values, left = {"t_no": 1 - said[7], "t_yes": said[7]}, np.arange(40) != 7
    without = intervals([BINARY], {"t": Cases(ends[0][left], ends[1][left])}, values)
    assert without != intervals([BINARY], cases, values) == intervals([BINARY], cases, values, {"other"})
    for digests in ({"patient7", "x"}, {"slide7"}, {"patient7", "slide7"}):
        assert intervals([BINARY], cases, values, digests) == without
