"""The store as its README specifies it, read by the README's own programs, which know nothing of this package."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config.base import fingerprint
from pipeline.schema import CATALOGUE, INDEX, PACK, PATCHES, SCHEMA_VERSION
from pipeline.store.catalogue import FAN, Catalogue
from pipeline.store.shelf import Shelf
from tests.pipeline.datasets.made import as_written, patch_store

README = Path(__file__).resolve().parents[3] / "pipeline" / "store" / "README.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `runs/demo/patches`: of two slides with folders and a packed one, one was removed."""
    folder = tmp_path_factory.mktemp("format")
    with pytest.MonkeyPatch.context() as patch:
        spec = patch_store(folder, patch)
    shutil.copytree(spec.parent, folder / "runs" / "demo" / "patches")
    shelf = Shelf(str(folder / "runs" / "demo" / "patches" / spec.name))
    shelf.forget([keys(folder)[0]])
    refused = {"kind": "source", "status": "quarantined", "uri": "u"}
    for number in range(FAN):  # so many files are merged, and the merged ones stay for a while
        shelf.append([{**refused, "asked": str(number)}])
    shelf.tidy()
    assert sorted(path.name[:2] for path in Path(shelf.catalogue.uri).iterdir())[-1] == "01"
    return folder


def keys(folder: Path) -> list[str]:
    """Of all slides that were written."""
    (spec,) = (folder / "runs" / "demo" / "patches").iterdir()
    return sorted(as_written(spec))


def run(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """What the names of a program of the README stand for after it ran in the folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)[number], names)
    return names


def test_pyarrow_alone_reads_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = (made / "runs" / "demo" / "patches").iterdir()
    first = run(0, made, monkeypatch)["first"]
    assert first == {key: as_written(spec)[key][0][2] for key in keys(made)[1:]}


def test_duckdb_reads_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(1, made, monkeypatch)["slides"]
    assert [(key, n, mpp) for key, _, n, mpp in found] == [(key, 20, None) for key in keys(made)[1:]]
    assert {Path(file).parent for _, files, _, _ in found for file in files} == {made}


def test_the_program_with_open_store_runs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(2, made, monkeypatch)
    assert names["some"].data.shape == (3, 32, 32, 3)
    assert names["box"].rows.tolist() == names["slide"].rows_in(0, 0, 64, 64).tolist() != []
    assert len(set(zip(names["drawn"].keys, names["drawn"].rows.tolist(), strict=True))) == 16
    assert len(next(iter(names["loader"]))["image"]) == 8
    assert names["places"].num_rows == 20


def test_names_and_digests_are_as_specified(made: Path) -> None:
    (spec,) = (made / "runs" / "demo" / "patches").iterdir()
    text = README.read_text()
    assert f"This is version {SCHEMA_VERSION}." in text
    assert f'{{"schema": {SCHEMA_VERSION}, "tiling"' in text
    for schema in (CATALOGUE, INDEX, PATCHES, PACK):
        assert schema.metadata[b"ips.schema_version"] == str(SCHEMA_VERSION).encode()
    for name in (*INDEX.names, *PATCHES.names, *PACK.names):
        assert f"`{name}`" in text
    for path in spec.glob("*/slide.json"):
        facts = json.loads(path.read_text())
        canonical = json.dumps({"schema": 6, "tiling": facts["spec"]}, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(canonical.encode()).hexdigest()[:16] == spec.name == fingerprint(json.loads(canonical))
        identity = json.dumps([facts[name] for name in ("content", "mpp", "guide", "series")])
        assert hashlib.sha256(identity.encode()).hexdigest()[:32] == path.parent.name
        for entry in [*facts["parts"], facts["index"], facts["thumbnail"], *facts["files"]]:
            data = (path.parent / entry["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        for part in facts["parts"]:
            assert part["name"] == f"part-{facts['parts'].index(part):05d}-{part['sha256'][:12]}.arrow"
        assert np.array_equal(pq.read_table(path.parent / "index.parquet")["row"], np.arange(20))
    for file in [*spec.glob("catalogue/*.parquet"), *spec.glob("packs/*.arrow")]:
        named = re.sub(r"^(\d\d|pack)-", "", file.stem)
        assert hashlib.sha256(file.read_bytes()).hexdigest()[: len(named)] == named
    assert len(Catalogue(str(spec)).read().slides) == 2
