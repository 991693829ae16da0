from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StorageError
from pipeline.ingest.isolated import store_slide
from pipeline.view.stored import Stored
from tests.dicom import write_series
from tests.pipeline.small import small_config, store_slides, write_cohort, write_slide
from tests.synth import tissue_rgb


def test_the_slides_of_a_store_have_tissue_and_patches(tmp_path: Path) -> None:
    config = small_config()
    cohort = write_cohort(tmp_path, ["a", "b"])
    stored = store_slides(cohort, tmp_path / "store", config)
    found = Stored(str(tmp_path / "store"))
    assert [slide.uri for slide in found.slides] == sorted(slide.uri for slide, _ in stored)
    by_uri = {slide.uri: one for slide, one in stored}
    for number, slide in enumerate(found.slides):
        one = by_uri[slide.uri]
        patches = found.patches(number)
        assert patches is not None
        assert len(patches.squares) == one.n_patches
        np.testing.assert_array_equal(patches.squares.x, one.index().x)
        assert set(patches.squares.size) == {one.extent}
        mask = found.tissue(number)
        assert mask is not None
        assert 0 < mask.mean() < 1
        assert slide.facts["key"] == one.key
        assert found.series(number) is None
    assert dict(found.scales) == {}


def test_no_two_slides_are_called_alike_and_dicom_is_called_as_its_folder(tmp_path: Path) -> None:
    slide = write_cohort(tmp_path, ["a"]).slides[0]
    places = ["v/a.png", "w/a.png", "1.2.840.1", "1.2.840.2/0.dcm", "1.2.840.3/0.dcm"]
    for number, place in enumerate(places):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            write_slide(path, number)
        else:
            write_series(path if path.suffix != ".dcm" else path.parent, tissue_rgb(131, 97), name=place)
        store_slide(replace(slide, uri=str(path)), small_config().tiling, str(tmp_path / "store"))
    found = Stored(str(tmp_path / "store")).slides
    named = {one.uri.removeprefix(f"{tmp_path}/"): one.slide_id for one in found}
    assert named == dict(zip(places, ["a", "a-2", "1.2.840.1", "1.2.840.2", "1.2.840.3"], strict=True))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no patch store"):
        Stored(str(tmp_path))
