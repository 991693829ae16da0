from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SlideError
from pipeline.slides import limits
from pipeline.slides.limits import check_lengths
from pipeline.slides.open import open_slide
from tests.security.hostile import CATALOGUE
from tests.synth import tissue_rgb, write_pyramid


@pytest.mark.parametrize("name", [name for name, one in CATALOGUE.items() if one.reasons == ("too-large",)])
def test_what_no_slide_declares_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"is over|are over|name \d+ bytes") as caught:
        open_slide(Path(CATALOGUE[name].make(tmp_path)))
    assert caught.value.reason == "too-large"


def test_the_largest_tile_and_picture_that_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(613, 487), tile=240, levels=2)
    monkeypatch.setattr(limits, "MAX_TILE_PX", 240 * 240)
    monkeypatch.setattr(limits, "MAX_SLIDE_PX", 613 * 487)
    monkeypatch.setattr(limits, "MAX_PAGES", 2)
    open_slide(path).close()
    for name in ("MAX_TILE_PX", "MAX_SLIDE_PX", "MAX_PAGES"):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, getattr(limits, name) - 1)
            with pytest.raises(SlideError, match="over"):
                open_slide(path)


def test_tiles_may_share_their_bytes_where_that_costs_little() -> None:
    size, blank = 10**9, np.full(300_000, 900, np.uint64)
    check_lengths("a", size, [blank, np.full(30_000, 15_000, np.uint64)])
    check_lengths("a", 10**5, [np.full(8000, 30_000, np.uint64)])  # 240 MB
    check_lengths("a", 10**9, [np.full(10**6, 2**40, np.uint64)])  # none of them lies in the file
    with pytest.raises(SlideError, match="name 2400000000 bytes and the file has 350000"):
        check_lengths("a", 350_000, [np.full(8000, 300_000, np.uint64)])
