from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.patients import bag_name, check_agreement, check_specimens
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


def test_specimens_of_a_patient_have_labels_of_their_own(tmp_path: Path) -> None:
    tasks = small_config().tasks
    cohort = write_cohort(tmp_path, ["no", "yes", "yes", "no"])  # two slides a patient
    blocks = [replace(slide, extra={"block": name}) for slide, name in zip(cohort.slides, "ABAB", strict=True)]
    apart = replace(cohort, slides=tuple(blocks))
    check_specimens(apart.uri, apart.slides, "block")
    check_agreement(apart, tasks, "block")
    assert [bag_name(slide, "block") for slide in blocks] == ["p0/A", "p0/B", "p1/A", "p1/B"]
    assert bag_name(blocks[0], None) == "p0"
    alike = replace(cohort, slides=tuple(replace(slide, extra={"block": "A"}) for slide in cohort.slides))
    with pytest.raises(CohortError, match="specimen 'p0/A' has several labels .* give all of a specimen's slides one"):
        check_agreement(alike, tasks, "block")


def test_a_column_that_does_not_tell_specimens_apart_is_named(tmp_path: Path) -> None:
    slides = write_cohort(tmp_path, ["no", "yes", "yes"]).slides
    check_specimens("c.csv", slides, None)
    with pytest.raises(CohortError, match="cohort.specimen: no column 'block' beside .* found 'organ', 'site'"):
        check_specimens("c.csv", [replace(one, extra={"organ": "a", "site": "b"}) for one in slides], "block")
    named = [replace(one, extra={"block": "n/a" if one.slide_id == "s1" else "A"}) for one in slides]
    with pytest.raises(CohortError, match=r"column 'block' \(cohort.specimen\) is empty for slide 's1'"):
        check_specimens("c.csv", named, "block")
    owners = [("a", "b/c"), ("a/b", "c"), ("a", "d")]
    alike = [replace(one, patient_id=p, extra={"block": b}) for one, (p, b) in zip(slides, owners, strict=True)]
    with pytest.raises(CohortError, match="'a/b/c' names specimens of the patients 'a' and 'a/b'; rename one"):
        check_specimens("c.csv", alike, "block")


def test_a_cohort_of_specimens_is_checked_and_split_by_patient(tmp_path: Path) -> None:
    rows = "".join(f"s{n},s{n}.svs,p{n // 2},{'AB'[n % 2]},{'yes' if n % 2 else 'no'}\n" for n in range(40))
    (tmp_path / "cohort.csv").write_text(f"slide_id,uri,patient_id,block,label\n{rows}")
    asked = {"uri": str(tmp_path / "cohort.csv"), "bag": "patient"}
    cohort = load_cohort(small_config(cohort={**asked, "specimen": "block"}), needs_labels=True)
    splits = {slide.patient_id: slide.split for slide in cohort.slides}
    assert all(slide.split == splits[slide.patient_id] for slide in cohort.slides)
    with pytest.raises(CohortError, match="no column 'organ'"):
        load_cohort(small_config(cohort={**asked, "specimen": "organ"}), needs_labels=True)
    with pytest.raises(CohortError, match="patient 'p0' has several labels"):
        load_cohort(small_config(cohort=asked), needs_labels=True)
