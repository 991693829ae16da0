"""Folders of DICOM files: which of them are a slide, wherever they lie, and which are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from pipeline.errors import SlideError
from pipeline.slides.folders import main_file, slides_in
from pipeline.slides.identity import slide_digest, slide_files, slide_version
from pipeline.slides.open import open_uri
from pipeline.storage.staging import Staging
from tests.dicom import uid, write_series
from tests.pipeline.formats.test_dicom import dicom_file
from tests.s3 import S3Server
from tests.synth import tissue_rgb

RGB = tissue_rgb(211, 157)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_folder_of_one_series_is_the_slide_that_its_files_are(
    place: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity, version and pixels; a map of the slide beside it is none of it, and all of its files come along."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.bucket("folders")
    folder = server.folder / "folders" / "1.2.840"
    first, second = write_series(folder, RGB)
    (folder / "map.dcm").write_bytes(dicom_file(uid("map"), b"numbers"))
    (folder / "notes.txt").write_text("no DICOM file" * 100)
    base = "s3://folders/1.2.840/" if place == "s3" else str(folder)
    members = [f"{base.rstrip('/')}/{path.name}" for path in (first, second)]
    assert main_file(base) == members[0] == main_file(members[0])
    assert slide_files(base) == members
    assert slide_version(base) == slide_version(members[0])
    assert slide_digest(base) == slide_digest(str(first)) == slide_digest(str(second))
    with open_uri(base, partial(slide_files, base), Staging(str(tmp_path / "copies"))) as reader:
        assert len(reader.levels) == 2
        assert np.array_equal(reader.read(0, 0, 0, 211, 157), RGB)
    before = slide_version(base), slide_digest(base)
    second.unlink()
    assert slide_version(base) != before[0]
    assert slide_digest(base) != before[1]


def _two(folder: Path) -> None:
    write_series(folder, RGB)
    for path in write_series(folder.parent / "other", RGB, name="other"):
        shutil.copy(path, folder / f"other-{path.name}")


def _without_base(folder: Path) -> None:
    write_series(folder, RGB, factors=(1, 2, 4))[0].unlink()


def _of_two_studies(folder: Path) -> None:
    _, second = write_series(folder, RGB)
    changed = dcmread(second)
    changed.StudyInstanceUID = uid("another study")
    changed.save_as(second)


def _no_slide(folder: Path) -> None:
    folder.mkdir()
    (folder / "map.dcm").write_bytes(dicom_file(uid("map"), b"numbers"))


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (_two, "series", r"DICOM files of 2 slides: .*0.dcm is of series [\d.]+ \(2 files\).*; name a file of the one"),
        (_without_base, "series", r"1.dcm: the image at full resolution is missing: each of its 2 files .*RESAMPLED"),
        (_of_two_studies, "series", r"0.dcm: the files of its series name 2 studies, as 0.dcm and 1.dcm do; take out"),
        (_no_slide, "directory", r"a directory that holds no DICOM slide \(files that end in .dcm\); name the slide's"),
        (Path.mkdir, "directory", r"holds no DICOM slide"),
    ],
)
def test_what_is_not_one_slide_is_refused(make: Callable[[Path], None], reason: str, said: str, tmp_path: Path) -> None:
    make(tmp_path / "slide")
    for ask in (slide_version, slide_files, slide_digest):
        with pytest.raises(SlideError, match=said) as caught:
            ask(str(tmp_path / "slide"))
        assert caught.value.reason == reason


def test_a_level_between_may_be_missing(tmp_path: Path) -> None:
    write_series(tmp_path / "slide", RGB, factors=(1, 2, 4))[1].unlink()
    assert [Path(uri).name for uri in slide_files(str(tmp_path / "slide"))] == ["0.dcm", "2.dcm"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_dicom_slide_is_not_opened_by_a_file_whose_name_does_not_say_so(
    place: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSlide would take the whole series, and the digest be of one file; with the suffix each names all of it."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.bucket("archive")
    folder = server.folder / "archive" / "case"
    paths = [path.rename(path.with_name(f"IM000{n}")) for n, path in enumerate(write_series(folder, RGB))]
    base = "s3://archive/case" if place == "s3" else str(folder)
    for path in paths:
        uri = f"{base}/{path.name}"
        told = rf"{path.name}: a DICOM slide whose name does not end in \.dcm.*; rename .*, as to {path.name}\.dcm"
        with (
            pytest.raises(SlideError, match=told) as caught,
            open_uri(uri, partial(slide_files, uri), Staging(str(tmp_path / "copies"))),
        ):
            pass
        assert caught.value.reason == "series"
    paths[1].rename(folder / "IM0001.DCM")
    uri = f"{base}/IM0001.DCM"
    assert slide_files(uri) == [uri, f"{base}/IM0000"]
    with open_uri(uri, partial(slide_files, uri), Staging(str(tmp_path / "copies"))) as reader:
        assert np.array_equal(reader.read(0, 0, 0, 211, 157), RGB)
    shutil.rmtree(folder)


def test_files_of_a_folder_by_the_slides_that_they_are_of(tmp_path: Path) -> None:
    _two(tmp_path / "slide")
    names = [path.name for path in (tmp_path / "slide").iterdir()]
    found = slides_in(str(tmp_path / "slide"), [*names, "absent.dcm"])
    assert [one.names for one in found] == [("0.dcm", "1.dcm"), ("other-0.dcm", "other-1.dcm")]
    assert [one.uid for one in found] == [uid("slide", "series"), uid("other", "series")]
