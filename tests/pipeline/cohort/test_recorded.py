from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.recorded import Recorded, read_recorded, record
from pipeline.cohort.splits import with_splits
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.data import SplitConfig


def _cohort(patients: range) -> Cohort:
    slides = [CohortSlide(f"s{n}", f"/s{n}", f"p{n}", None, None, {}, {}) for n in patients]
    return Cohort("cohort.csv", tuple(slides))


def _splits(cohort: Cohort) -> dict[str, str | None]:
    return {slide.patient_id: slide.split for slide in cohort.slides}


def test_patients_keep_their_split_whatever_is_drawn_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, first, other = str(tmp_path), SplitConfig(), SplitConfig(train=0.2, val=0.2, test=0.6)
    assert read_recorded(root) == Recorded()
    drawn = with_splits(_cohort(range(53)), first, 3)
    record(root, drawn, first, 3, Recorded())
    text = (tmp_path / "splits.json").read_text()
    assert "p17" not in text
    with caplog.at_level(logging.WARNING, "pipeline"):
        again = with_splits(_cohort(range(71)), other, 8, read_recorded(root))
        record(root, again, other, 8, read_recorded(root))
    assert {patient: split for patient, split in _splits(again).items() if int(patient[1:]) < 53} == _splits(drawn)
    assert "keep theirs, which were drawn by {'seed': 3" in caplog.text
    kept = read_recorded(root)
    assert (len(kept.splits), kept.drawn_by) == (71, {"seed": 3, "train": 0.6, "val": 0.15, "test": 0.25})


def test_nothing_is_written_where_nobody_is_new(tmp_path: Path) -> None:
    root, shares = str(tmp_path), SplitConfig()
    drawn = with_splits(_cohort(range(5)), shares, 0)
    record(root, drawn, shares, 0, Recorded())
    before = (tmp_path / "splits.json").stat().st_mtime_ns
    record(root, replace(drawn, slides=drawn.slides[:3]), shares, 0, read_recorded(root))
    assert (tmp_path / "splits.json").stat().st_mtime_ns == before


def test_new_patients_can_be_kept_out_of_the_test(tmp_path: Path) -> None:
    shares = SplitConfig(train=0.3, val=0.2, test=0.5)
    first = with_splits(_cohort(range(40)), shares, 0, Recorded(), "train")
    assert {slide.split for slide in first.slides} == {"train", "val", "test"}  # the first ones are drawn
    record(str(tmp_path), first, shares, 0, Recorded())
    later = with_splits(_cohort(range(140)), shares, 0, read_recorded(str(tmp_path)), "train")
    new = [slide.split for slide in later.slides[40:]]
    assert "test" not in new
    assert 10 <= new.count("val") <= 32  # 20 expected
