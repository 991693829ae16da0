from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.patients import check_agreement
from pipeline.errors import CohortError
from pipeline.workflow.run import load_cohort
from tests.pipeline.small import small_config, write_cohort


def test_labels_of_a_patient_agree_or_are_missing(tmp_path: Path) -> None:
    tasks = small_config().tasks
    check_agreement(write_cohort(tmp_path, ["no", "no", None, "yes"]), tasks)  # two slides a patient
    wrong = write_cohort(tmp_path, ["no", "yes", "yes", "no", "no"])
    with pytest.raises(CohortError) as caught:
        check_agreement(wrong, tasks)
    assert caught.value.problems[0].startswith(
        "patient 'p0' has several labels in column 'label': 'no' on s0, 'yes' on s1; give all of a patient's slides one"
    )
    assert len(caught.value.problems) == 2
    many = replace(
        wrong, slides=tuple(replace(slide, patient_id=str(n)) for n in range(30) for slide in wrong.slides[:2])
    )
    with pytest.raises(CohortError, match="and 10 more patients"):
        check_agreement(many, tasks)


def test_a_cohort_of_patients_whose_labels_differ_is_refused_before_anything_runs(tmp_path: Path) -> None:
    rows = "".join(f"s{n},s{n}.svs,p{n // 2},{'yes' if n % 4 < 3 else 'no'}\n" for n in range(12))
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,patient_id,label\n{rows}")
    uri = str(tmp_path / "cohort.csv")
    with pytest.raises(CohortError, match="patient 'p1' has several labels in column 'label': 'yes' on s2, 'no' on s3"):
        load_cohort(small_config(cohort={"uri": uri, "bag": "patient"}), needs_labels=True)
    load_cohort(small_config(cohort={"uri": uri, "bag": "patient"}), needs_labels=False)
