"""A slide's files: looked at, opened and identified, and refused where they change meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import SlideError
from pipeline.ingest.source import identified, look_at, version_of
from pipeline.ingest.tiler import store_slide
from pipeline.ingest.versions import look_at as look_at_all
from pipeline.storage import files
from tests.dicom import write_series
from tests.pipeline.tiled import RGB, SPEC, row
from tests.s3 import S3Server

IMAGE = SPEC.model_copy(update={"mpp": None})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_file_that_changes_while_it_is_read_is_refused(image: Path) -> None:
    source = look_at(row(image), IMAGE, image.stat().st_size)
    with identified(source) as found:
        assert found.reader.dimensions == (613, 487)
        source.check()
        os.utime(image, (1, 1))
        with pytest.raises(SlideError, match="was replaced while it was read") as caught:
            source.check()
    assert caught.value.reason == "changed"


def test_bytes_that_were_fetched_are_of_one_state(
    image: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    uri = "s3://slides/a.png"
    files.write_bytes(uri, image.read_bytes())
    slide = row(uri)
    source = look_at(slide, IMAGE, 1)
    assert source.version == version_of(slide, IMAGE)
    files.write_bytes(uri, b"another one")
    source.check()  # what is tiled is what was fetched, and its version is remembered
    with identified(source) as found:
        assert found.reader.dimensions == (613, 487)
    assert source.version != version_of(slide, IMAGE)


def test_a_folder_of_dicom_files_is_tiled_as_the_slide_that_they_are(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here and in a bucket, whole and by one file: one key, for it is one content; asked for alone and with others."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    first, second = write_series(tmp_path / "case", RGB)
    for path in (first, second):
        files.write_bytes(f"s3://slides/case/{path.name}", path.read_bytes())
    places = [str(tmp_path / "case"), str(second), "s3://slides/case/", "s3://slides/case/1.dcm"]
    statuses = [store_slide(row(place), SPEC, str(tmp_path / "store")) for place in places]
    assert {status.error for status in statuses} == {None}
    assert len({status.key for status in statuses}) == 1
    slides = [row(place) for place in (*places, str(tmp_path), "s3://slides/nothing/")]
    *found, nowhere, nothing = look_at_all(slides, SPEC)
    assert found == [version_of(slide, SPEC) for slide in slides[:4]]
    for refused in (nowhere, nothing):
        assert isinstance(refused, SlideError)
        assert refused.reason == "directory"


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(SlideError, match="zero bytes"), identified(look_at(row(tmp_path / "a.png"), IMAGE, 0)):
        pass
