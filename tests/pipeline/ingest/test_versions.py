from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest import versions
from pipeline.ingest.source import version_of
from pipeline.ingest.versions import Looked, look_at
from tests.pipeline.tiled import SPEC, row
from tests.s3 import serve_s3


def alone(slide: CohortSlide, spec: TilingConfig) -> Looked:
    try:
        return version_of(slide, spec)
    except SlideError as error:
        return error


def said(looked: Looked) -> object:
    return (looked.reason, str(looked)) if isinstance(looked, SlideError) else looked


@pytest.mark.parametrize("remote", [0, 1])
def test_all_versions_are_those_of_each_slide(
    remote: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "s3" / "b"
    folder.mkdir(parents=True)
    monkeypatch.setattr(versions, "TOGETHER", 3)
    for name in ("a.tiff", "b.tiff", "c.mrxs", "c/Slidedat.ini", "mask.png", "d.h5"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        place = "s3://b" if remote else str(folder)
        slides = [row(f"{place}/{name}") for name in ("a.tiff", "b.tiff", "c.mrxs", "none.tiff", "c")]
        slides.append(replace(row(f"{place}/a.tiff"), mask=f"{place}/mask.png"))
        slides.append(replace(row(f"{place}/a.tiff"), mask=f"{place}/gone.png"))
        given = SPEC.model_copy(update={"coords": place})
        guided = [replace(row(f"{place}/a.tiff"), slide_id=name) for name in ("d", "e")]
        for spec, cohort in ((SPEC, slides), (given, guided)):
            found = look_at(cohort, spec)
            assert [said(version) for version in found] == [said(alone(slide, spec)) for slide in cohort]
        assert [isinstance(version, SlideError) for version in found] == [False, True]
