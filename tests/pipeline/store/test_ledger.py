"""The ledgers: every row of the cohort once, every file, every patch that was lost."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ingest.group import Group
from pipeline.ingest.isolated import read_slide
from pipeline.ingest.statuses import numbered, outcomes
from pipeline.ingest.tiler import ReadSlide, store_slide
from pipeline.ingest.versions import look_at
from pipeline.schema import CORRUPTION_LEDGER, FILE_LEDGER, SLIDE_LEDGER
from pipeline.storage.files import SourceVersion
from pipeline.store.ledger import write_ledger
from pipeline.store.patches import PatchStore, SlideStatus
from tests.pipeline.small import pack_slides, small_config, write_cohort
from tests.pipeline.tiled import PATCH, RGB, SPEC, row, spoilt
from tests.synth import write_pyramid, zero_tile

KINDS = ["blank", "no-mpp", "empty", "text", "short", "none"]


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """Of two good slides, one of them twice, one that lost patches, and bad ones."""
    folder = tmp_path_factory.mktemp("cohort")
    good = write_pyramid(folder / "good.tiff", RGB, levels=2)
    torn = write_pyramid(folder / "torn.tiff", RGB, levels=2)
    zero_tile(torn, 0, 1)
    paths = [good, torn, good, *(spoilt(kind, good, folder) for kind in KINDS)]
    spec = SPEC.model_copy(update={"max_bad_tiles": 0.9})
    slides = [row(path) for path in paths]
    statuses = [store_slide(slide, spec, str(folder / "store")) for slide in slides]
    store = PatchStore(str(folder / "store"), spec.fingerprint())
    versions = look_at(slides, spec)
    uris = write_ledger(store, outcomes(slides, statuses, versions), str(folder / "ledger"))
    again = write_ledger(store, outcomes(slides, numbered(enumerate(statuses)), list(versions)), str(folder / "again"))
    for name, uri in uris.items():
        assert Path(uri).read_bytes() == Path(again[name]).read_bytes()
    return {name.removeprefix("ledger_"): pq.read_table(uri) for name, uri in uris.items()}


def test_their_schemas_are_fixed(ledgers: dict[str, pa.Table]) -> None:
    assert ledgers["slides"].schema.equals(SLIDE_LEDGER, check_metadata=True)
    assert ledgers["files"].schema.equals(FILE_LEDGER, check_metadata=True)
    assert ledgers["corruption"].schema.equals(CORRUPTION_LEDGER, check_metadata=True)


def test_every_row_of_the_cohort_has_one_status(ledgers: dict[str, pa.Table]) -> None:
    rows = ledgers["slides"].to_pylist()
    assert [line["slide_id"] for line in rows] == ["good", "torn", "good", *KINDS]
    assert [line["status"] for line in rows] == ["committed"] * 3 + ["quarantined"] * 6
    assert [line["reason"] for line in rows[3:]] == [
        "no-tissue",
        "missing-mpp",
        "empty-file",
        "not-a-slide",
        "truncated",
        "missing",
    ]
    assert all(
        line["message"].startswith(line["reason"] + ": ") and "Traceback" in line["traceback"] for line in rows[3:]
    )
    assert rows[0]["key"] == rows[2]["key"] != rows[1]["key"]
    assert (rows[0]["width"], rows[0]["height"], rows[0]["mpp"]) == (613, 487, 0.5)
    assert rows[1]["n_bad_tiles"] > 0
    assert json.loads(rows[1]["rejects"])["bad-tile"] == rows[1]["n_bad_tiles"]
    assert 0.25 < rows[0]["tissue"] < 0.4
    assert 0 < rows[0]["tissue_beyond"] < 0.1  # whole patches alone
    assert (rows[3]["tissue"], rows[3]["tissue_beyond"]) == (None, None)


def test_every_file_is_there_with_its_digest(ledgers: dict[str, pa.Table]) -> None:
    rows = ledgers["files"].to_pylist()
    sources = [line for line in rows if line["role"] == "source"]
    assert [line["slide_id"] for line in sources] == ["good", "torn", "good", *KINDS]
    assert [line["bytes"] for line in sources[:2]] == [Path(line["uri"]).stat().st_size for line in sources[:2]]
    assert sources[-1]["bytes"] is None  # it was never there
    stored = [line for line in rows if line["role"] == "stored"]
    assert len({line["uri"] for line in stored}) == len(stored)
    for line in stored:
        data = Path(line["uri"]).read_bytes()
        assert (line["bytes"], line["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    patches = {line["key"]: line["n_patches"] for line in ledgers["slides"].to_pylist() if line["key"]}
    assert Counter({line["key"]: line["patches"] for line in stored if line["patches"]}) == patches


def test_what_could_not_be_read_is_listed(ledgers: dict[str, pa.Table]) -> None:
    rows = ledgers["corruption"].to_pylist()
    torn = next(line for line in ledgers["slides"].to_pylist() if line["slide_id"] == "torn")
    tiles = [line for line in rows if line["kind"] == "bad-tile"]
    assert len(tiles) == torn["n_bad_tiles"]
    assert {(line["slide_id"], line["key"], line["level"], line["edge"]) for line in tiles} == {
        ("torn", torn["key"], 0, PATCH)
    }
    assert all(240 - PATCH < line["x"] < 480 and line["y"] < 240 for line in tiles)  # around the tile that is zeroed
    assert [(line["slide_id"], line["kind"]) for line in rows if line["key"] is None] == [
        ("empty", "empty-file"),
        ("text", "not-a-slide"),
        ("short", "truncated"),
    ]


def test_packs_are_files_too(tmp_path: Path) -> None:
    config = small_config()
    pairs = pack_slides(write_cohort(tmp_path, ["no", "yes"]), tmp_path / "store", config)
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    slides = [slide for slide, _ in pairs]
    statuses = [SlideStatus(slide.slide_id, slide.uri, stored.key, "committed") for slide, stored in pairs]
    uris = write_ledger(store, outcomes(slides, statuses, look_at(slides, config.tiling)), str(tmp_path / "ledger"))
    rows = pq.read_table(uris["ledger_files"]).to_pylist()
    (pack,) = (line for line in rows if line["role"] == "stored")
    data = Path(pack["uri"]).read_bytes()
    assert (pack["bytes"], pack["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert pack["patches"] == sum(stored.n_patches for _, stored in pairs)


def test_a_file_that_was_replaced_meanwhile_has_the_version_that_was_read(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, levels=2)
    slide = row(path)
    (asked,) = look_at([slide], SPEC)
    assert isinstance(asked, SourceVersion)
    write_pyramid(path, RGB[:-7], levels=2)
    (now,) = look_at([slide], SPEC)
    found, rows = read_slide(slide, asked, SPEC, str(tmp_path / "store"), pixels=True)
    store = PatchStore(str(tmp_path / "store"), SPEC.fingerprint())
    group = Group(store, np.empty(0, "S32"))
    assert isinstance(found, ReadSlide), rows
    group.add(0, found)
    statuses = numbered(group.commit())
    uris = write_ledger(store, outcomes([slide], statuses, [asked]), str(tmp_path / "ledger"))
    source = pq.read_table(uris["ledger_files"]).to_pylist()[0]
    assert SourceVersion(source["bytes"], source["etag"], source["mtime"]) == now != asked
