"""Stores of three slides, two with folders of three parts, one in a pack: their patches, and features of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cohort.table import Cohort
from pipeline.store import parts
from pipeline.store.features import FeatureStore
from pipeline.store.packs import read_pack
from pipeline.store.patches import PatchStore
from tests.pipeline.small import pack_slides, small_config, store_slides, write_cohort

DIM = 7
Stored = list[tuple[int, int, bytes]]


def patch_store(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The folder of its spec; slides s0, s1 and s2 (packed) of 20 patches of 32 px."""
    patch.setattr(parts, "MAX_PART_PATCHES", 9)
    config, cohort = small_config(), write_cohort(folder, ["no", "yes", "no"])
    store_slides(Cohort(cohort.uri, cohort.slides[:2]), folder / "patches", config)
    pack_slides(Cohort(cohort.uri, cohort.slides[2:]), folder / "patches", config)
    return folder / "patches" / config.tiling.fingerprint()


def feature_store(spec: Path, folder: Path) -> Path:
    """Features of that store: of row r of the k-th slide by key 100 k + r + 0, 0.5, ...; the packed slide's packed."""
    patches = PatchStore(str(spec.parent), spec.name)
    store = FeatureStore(str(folder / "features"), spec.name, "0123456789abcdef")
    for number, slide in enumerate(patches.slides(patches.view.slides["key"].to_pylist())):
        vectors = 100 * number + np.arange(slide.n_patches)[:, None] + np.arange(DIM) / 2
        made = vectors.astype(np.float16)
        if slide.place is None:
            store.write(slide, [made[:13], made[13:]], {"name": "made"})
            store.append(store.rows(slide.key))
        else:
            store.append(store.pack([(slide, made)], {"name": "made"}))
    return Path(store.uri)


def as_written(spec: Path) -> dict[str, Stored]:
    """Key -> x, y and JPEG of each patch, read the slow way: all files whole, whatever the catalogue says of places."""
    found: dict[str, Stored] = {}
    for folder in spec.iterdir():
        if (folder / "slide.json").is_file():
            names = sorted(folder.glob("part-*.arrow"))
            tables = [pa.ipc.open_file(pa.py_buffer(name.read_bytes())).read_all() for name in names]
            found[folder.name] = _rows(pa.concat_tables(tables))
            assert len(pq.read_table(folder / "index.parquet")) == len(found[folder.name])
    for pack in spec.glob("packs/pack-*.arrow"):
        for slide in read_pack(str(pack))[1]:
            found[slide.key] = _rows(pa.Table.from_batches([slide.patches]))
    return found


def _rows(table: pa.Table) -> Stored:
    return [(row["x"], row["y"], row["image"]) for row in table.select(["x", "y", "image"]).to_pylist()]
