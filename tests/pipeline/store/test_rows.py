from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Catalogue
from pipeline.store.patches import SlideStatus
from pipeline.store.rows import asked_digest, outcome, source_row
from tests.pipeline.tiled import row

VERSION = SourceVersion(7, "etag", None)


@pytest.mark.parametrize("status", [
    SlideStatus("a", "/data/a.tiff", "k", "committed", None, 12, 3),
    SlideStatus("a", "/data/a.tiff", None, "quarantined", "too-expensive: x", error="trace", limits=(0.5, 2.0)),
    SlideStatus("a", "/data/a.tiff", None, "quarantined", "no-tissue: x", error="\ud800", picture="AAAA"),
])  # fmt: skip
def test_a_status_comes_back_from_its_row(status: SlideStatus, tmp_path: Path) -> None:
    slide = row("/data/a.tiff")
    catalogue = Catalogue(str(tmp_path / "spec"))
    made = source_row(slide, VERSION, asdict(status), "left")
    catalogue.append([made, {"kind": "slide", "key": "k", "n_bad_tiles": 3}])
    view = catalogue.read()
    (seen,) = view.sources.to_pylist()
    wide = ["error", "picture", "size", "etag", "mtime"]
    (others,) = catalogue.wide(view, wide, view.sources["id"].combine_chunks())
    seen |= others.to_pylist()[0]
    found = SlideStatus("a", slide.uri, **outcome(seen))
    assert found == replace(status, error=status.error and status.error.replace("\ud800", r"\ud800"))
    assert (seen["left"], seen["size"], seen["etag"], seen["mtime"]) == ("left", 7, "etag", None)


def test_all_that_is_asked_for_tells_sources_apart() -> None:
    slide = row("/data/a.tiff")
    others = [
        (slide, VERSION),
        (slide, replace(VERSION, size=8)),
        (slide, replace(VERSION, etag=None)),
        (slide, replace(VERSION, mtime=1.0)),
        (replace(slide, uri="/data/b.tiff"), VERSION),
        (replace(slide, mpp=0.5), VERSION),
        (replace(slide, mask="m"), VERSION),
        (replace(slide, coords="m"), VERSION),
        (replace(slide, series=0), VERSION),
    ]
    assert len({asked_digest(*one) for one in others}) == len(others)
    assert asked_digest(replace(slide, slide_id="other", labels={}), VERSION) == asked_digest(slide, VERSION)
