from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.predictions.asked import asked_slides
from tests.dicom import write_series
from tests.pipeline.formats.test_dicom import dicom_file
from tests.synth import tissue_rgb


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
    assert "2 DICOM files are left out: they are no images of slides" in caplog.text


def test_the_dicom_files_of_a_series_are_one_slide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Called as their folder where they have one of their own, else as their first file."""
    rgb = tissue_rgb(31, 23)
    for name, folder in (("a", "1.2.840.1"), ("b", "study"), ("c", "study/below")):
        write_series(tmp_path / "set" / folder, rgb, name=name)
    for path in write_series(tmp_path / "d", rgb, name="d"):
        path.rename(tmp_path / "set" / "study" / f"d-{path.name}")
    (tmp_path / "set" / "study" / "map.dcm").write_bytes(dicom_file("1.2", b"numbers"))
    with caplog.at_level(logging.WARNING):
        found = [one.slide for one in asked_slides([str(tmp_path / "set")], None)]
    assert [(one.slide_id, one.uri.removeprefix(f"{tmp_path}/set/")) for one in found] == [
        ("1.2.840.1", "1.2.840.1"), ("0", "study/0.dcm"), ("below", "study/below"), ("d-0", "study/d-0.dcm"),
    ]  # fmt: skip
    assert [one.message for one in caplog.records] == [
        f"predict: {tmp_path}/set/study: 1 DICOM files are left out: they are no images of slides"
    ]
    (alone,) = asked_slides([str(tmp_path / "set" / "1.2.840.1")], None)
    assert (alone.slide.slide_id, alone.slide.uri) == ("1.2.840.1", str(tmp_path / "set" / "1.2.840.1"))


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
