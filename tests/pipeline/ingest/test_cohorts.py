from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.data import CohortConfig
from pipeline.config.recipe import Config
from pipeline.errors import CohortError
from pipeline.ingest.cohorts import listed, located
from tests.pipeline.small import small_config
from tests.pipeline.tiled import row


def given_config(folder: Path, **changes: object) -> Config:
    """Features of 11 numbers that other tools have made."""
    plain: dict[str, object] = {
        "cohort": {"uri": str(folder / "cohort.csv")},
        "tiling": {"patch_px": 512, "mpp": 0.5},
        "storage": {"root": str(folder), "patches": str(folder / "patches"), "features": str(folder / "features")},
        "model": {
            "encoder": {"name": "features", "features": 11, "dim": 16},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16},
            "select": {"memory": 5, "chunk": 7},
        },
        "train": {"epochs": 3, "augment": False},
    }
    return small_config(**{**plain, **changes})


def test_a_row_stands_for_its_file_of_features(tmp_path: Path) -> None:
    config = given_config(tmp_path)
    (tmp_path / "cohort.csv").write_text("slide_id,features,label\na,f/a.h5,no\n")
    assert [slide.uri for slide in listed(config).slides] == [str(tmp_path / "f" / "a.h5")]
    (tmp_path / "cohort.csv").write_text("slide_id,uri,features\na,a.svs,f/a.h5\nb,b.svs,\nc,f/c.pt,\n")
    pixels = small_config(cohort={"uri": str(tmp_path / "cohort.csv")})
    assert [slide.uri.rpartition("/")[2] for slide in listed(pixels).slides] == ["a.svs", "b.svs", "c.pt"]
    with pytest.raises(CohortError, match=r"1 slides, such as 'b', name no file of features; fill the column features"):
        listed(config)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,features\na,,\n")
    with pytest.raises(CohortError, match="row 2: uri is empty"):
        listed(config)


def test_a_folder_s_file_bears_the_slide_s_id_or_its_file_s_name(tmp_path: Path) -> None:
    for name in ("a.h5", "b.pt", "file.h5", "x_1~56e5ef4a.h5"):
        (tmp_path / name).write_bytes(b"")
    asked = CohortConfig(uri="c", features=str(tmp_path))
    rows = [row("/s/a.svs"), row("/s/b.svs"), row("/s/gone.svs"), row("/s/other.h5")]
    found = located(asked, rows)
    assert [slide.uri for slide in found[:2]] == [str(tmp_path / "a.h5"), str(tmp_path / "b.pt")]
    assert found[2].uri.startswith(str(tmp_path / "gone"))
    assert found[3].uri == "/s/other.h5"
    named = [type(rows[0])("id", "/s/file.svs", "p", None, None, {}, {})]
    assert located(asked, named)[0].uri == str(tmp_path / "file.h5")
