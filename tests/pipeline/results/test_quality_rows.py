"""What is known of every slide, in columns."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.ingest.tiler import store_slide
from pipeline.results.quality_rows import QualityRow, _facts, _mpp_source, as_columns_of_rows, quality_csv, quality_rows
from pipeline.store.patches import PatchStore, SlideStatus
from tests.pipeline.small import small_config, write_cohort


def obvious(store: PatchStore, status: SlideStatus) -> QualityRow:
    """The same, of one slide."""
    return QualityRow(
        status.slide_id,
        status.uri,
        status.status,
        status.reason,
        patches=status.n_patches,
        bad_tiles=status.n_bad_tiles,
        key=status.key,
        picture=status.picture,
        **({} if status.key is None else _facts(store.facts(status.key), with_histogram=True)),
    )


def test_rows_are_those_of_each_slide(tmp_path: Path) -> None:
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "yes", "no"])
    (tmp_path / "bad.png").write_bytes(b"not an image")
    bad = replace(cohort.slides[0], slide_id="bad", uri=str(tmp_path / "bad.png"))
    slides = [*cohort.slides, bad, replace(cohort.slides[0], slide_id="twin")]
    statuses = [store_slide(slide, config.tiling, str(tmp_path / "store")) for slide in slides]
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    rows = quality_rows(store, statuses)
    assert rows == [obvious(store, status) for status in statuses]
    assert as_columns_of_rows(list(rows)) == rows
    assert quality_csv(list(rows)) == quality_csv(rows)
    shutil.rmtree(store.catalogue.uri)
    store.look_again()
    with pytest.raises(StorageError, match=f"{statuses[0].key}: its commit is gone"):
        quality_rows(store, statuses)


@pytest.mark.parametrize(
    ("mpp", "stated", "source"),
    [
        (None, [0.5, 0.5], "none"),
        (0.5, [0.5, 0.5], "file"),
        (math.sqrt(0.5 * 0.501), [0.5, 0.501], "file"),
        (0.25, [0.5, 0.5], "cohort or config"),
        (0.5, None, "cohort or config"),
        (0.5, [0.25, 0.5], "cohort or config; not square in the file, 0.25 x 0.5"),
    ],
)
def test_who_stated_the_microns(mpp: float | None, stated: list[float] | None, source: str) -> None:
    assert _mpp_source(mpp, stated) == source
