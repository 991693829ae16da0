from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StorageError
from pipeline.view.stored import Stored
from tests.pipeline.small import small_config, store_slides, write_cohort


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


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no patch store"):
        Stored(str(tmp_path))
