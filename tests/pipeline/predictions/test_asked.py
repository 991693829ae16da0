from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.predictions.asked import asked_slides


def test_a_folder_means_its_slides_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "b.svs",
        "a.TIFF",
        "thumb.png",
        "notes.txt",
        "below/b.ndpi",
        "s/1.dcm",
        "s/2.dcm",
        "m.mrxs",
        "m/Data.dat",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".x.svs.tmp").touch()
    with caplog.at_level(logging.WARNING):
        found = asked_slides([str(tmp_path)], None, mpp=0.3)
    assert [one.slide.slide_id for one in found] == ["a", "b", "b-2", "m"]
    assert {one.slide.mpp for one in found} == {0.3}
    assert "2 DICOM files are left out; name one file of each series" in caplog.text


def test_a_folder_without_slides_is_a_row_that_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (one,) = asked_slides([str(tmp_path)], None)
    assert one.slide.uri == str(tmp_path)
    assert "holds no slide" in caplog.text


def test_named_slides_come_first_and_a_cohort_keeps_its_ids(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("slide_id,uri\na,one.svs\n")
    found = asked_slides(["x/a.svs", "y/a.svs", "s3://bucket/a.svs"], str(tmp_path / "c.csv"))
    assert [one.slide.slide_id for one in found] == ["a-2", "a-3", "a-4", "a"]
    assert found[2].slide.uri == "s3://bucket/a.svs"
    assert ("--mpp" in found[0].mpp_remedy, "column" in found[3].mpp_remedy) == (True, True)
    with pytest.raises(StageError, match="no slides; name slides, folders or prefixes"):
        asked_slides([], None)
