"""The ledgers of a tiled cohort, as Parquet: what became of each slide, which files there are, what could not be read.

`slides.parquet` has one row for each row of the cohort, in its order; `files.parquet` one for each source and each
stored file; `corruption.parquet` one for each patch that could not be decoded and each slide whose file is broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.schema import CORRUPTION_LEDGER, FILE_LEDGER, SLIDE_LEDGER
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.packs import PACKS, pack_sha256, pack_uri
from pipeline.store.parts import parquet_bytes
from pipeline.store.patches import PatchStore, SlideStatus

BATCH = 4096  # rows made of Python objects at a time; a million of them would take gigabytes
_OF_COMMITS = ("key", "content", "vendor", "mpp", "width", "height", "level", "rejects", "tissue", "tissue_beyond")
_COMMITS = pa.schema([SLIDE_LEDGER.field(name) for name in _OF_COMMITS])
BROKEN = frozenset({"bad-tiles", "empty-file", "not-a-slide", "truncated", "unopenable", "unreadable"})
"""Reasons that say that a slide's file is damaged, where the others are about what it shows or how it is asked for."""


def write_ledger(
    store: PatchStore,
    slides: Sequence[CohortSlide],
    versions: Sequence[SourceVersion | None],
    statuses: Sequence[SlideStatus],
    folder: str,
) -> dict[str, str]:
    """Write the three ledgers into a folder; their URIs by name.

    Args:
        store: where the slides are.
        slides: all rows of the cohort.
        versions: of their files; None of one that could not be reached.
        statuses: of each one, in that order.
        folder: URI.

    Raises:
        StorageError: the folder cannot be written.
    """
    keys = list(dict.fromkeys(status.key for status in statuses if status.key is not None))
    commits, stored, torn = _stored(store, keys)
    sources = _table(_sources(slides, versions, statuses), FILE_LEDGER)
    tables = {
        "slides": _slides(slides, statuses, commits),
        "files": pa.concat_tables([sources, stored, _packs(store, keys)]),
        "corruption": _table(_corruption(slides, statuses, torn), CORRUPTION_LEDGER),
    }
    uris = {f"ledger_{name}": files.join(folder, f"{name}.parquet") for name in tables}
    for uri, table in zip(uris.values(), tables.values(), strict=True):
        files.write_bytes(uri, parquet_bytes(table))
    return uris


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table, some thousands of them as Python objects at a time."""
    batches: list[pa.RecordBatch] = []
    held: list[Mapping[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == BATCH:
            batches.append(pa.RecordBatch.from_pylist(held, schema=schema))
            held = []
    return pa.Table.from_batches([*batches, pa.RecordBatch.from_pylist(held, schema=schema)])


def _stored(store: PatchStore, keys: Iterable[str]) -> tuple[pa.Table, pa.Table, dict[str, Mapping[str, Any]]]:
    """What the slides' commits say, their files, each in the order of the keys, and the commits that lost patches."""
    torn: dict[str, Mapping[str, Any]] = {}
    tables: tuple[list[pa.Table], list[pa.Table]] = ([], [])
    commits: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []

    def flush() -> None:
        tables[0].append(pa.Table.from_pylist(commits, schema=_COMMITS))
        tables[1].append(pa.Table.from_pylist(entries, schema=FILE_LEDGER))
        commits.clear()
        entries.clear()

    for key, facts in store.all_facts(keys):
        commits.append(_commit(facts))
        entries += _files(store, key, facts)
        if facts["bad_tiles"]:
            torn[key] = facts
        if len(commits) == BATCH:
            flush()
    flush()
    joined = [pa.concat_tables(each) for each in tables]
    by_key = [table.take(pc.sort_indices(table["key"])) for table in joined]
    return by_key[0], by_key[1], torn


def _commit(facts: Mapping[str, Any]) -> dict[str, Any]:
    width, height = facts["dimensions"]
    mask = facts["evidence"]["mask"]
    return {
        **{name: facts[name] for name in ("key", "content", "vendor", "mpp", "level")},
        "width": width,
        "height": height,
        "rejects": json.dumps(facts["rejects"], sort_keys=True),
        "tissue": mask.get("share"),
        "tissue_beyond": mask.get("beyond"),
    }


def _files(store: PatchStore, key: str, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "parts" not in facts:  # of a slide in a pack
        return
    for file in (*facts["parts"], facts["index"], facts["thumbnail"], *facts["files"]):
        names = ("bytes", "sha256", "patches")
        place = files.join(store.uri, key, file["name"])
        yield {"role": "stored", "key": key, "uri": place, **{name: file.get(name) for name in names}}


def _packs(store: PatchStore, keys: Iterable[str]) -> pa.Table:
    """The packs that slides are in, with the patches of those slides."""
    chosen = store.view.slides.take(store.view.slide_places(list(keys)).drop_null())
    counts = chosen.filter(pc.is_valid(chosen["pack"])).group_by("pack").aggregate([("n_patches", "sum")])
    sizes = {name: version.size for name, version in files.list_versions(files.join(store.uri, PACKS)).items()}
    rows = [
        {
            "role": "stored",
            "uri": pack_uri(store.uri, row["pack"]),
            "bytes": sizes.get(row["pack"]),
            "sha256": pack_sha256(row["pack"]),
            "patches": row["n_patches_sum"],
        }
        for row in counts.sort_by("pack").to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=FILE_LEDGER)


def _slides(slides: Sequence[CohortSlide], statuses: Sequence[SlideStatus], commits: pa.Table) -> pa.Table:
    columns: dict[str, Any] = {
        name: [getattr(slide, name) for slide in slides] for name in ("slide_id", "patient_id", "uri")
    }
    columns |= {
        name: [getattr(status, name) for status in statuses] for name in ("status", "key", "n_patches", "n_bad_tiles")
    }
    columns["reason"] = [_category(status) for status in statuses]
    columns["message"] = [status.reason for status in statuses]
    columns["traceback"] = [status.error for status in statuses]
    places = pc.index_in(pa.array(columns["key"], pa.string()), value_set=commits["key"].combine_chunks())
    found = commits.take(places)
    columns |= {name: found[name] for name in _OF_COMMITS[1:]}
    columns["rejects"] = pc.fill_null(columns["rejects"], "{}")
    return pa.table([columns[name] for name in SLIDE_LEDGER.names], names=SLIDE_LEDGER.names).cast(SLIDE_LEDGER)


def _category(status: SlideStatus) -> str | None:
    return None if status.reason is None else status.reason.partition(":")[0]


def _sources(
    slides: Sequence[CohortSlide], versions: Sequence[SourceVersion | None], statuses: Sequence[SlideStatus]
) -> Iterator[dict[str, Any]]:
    for slide, version, status in zip(slides, versions, statuses, strict=True):
        row: dict[str, Any] = {"role": "source", "slide_id": slide.slide_id, "uri": slide.uri, "key": status.key}
        if version is not None:
            row |= {"bytes": version.size, "etag": version.etag, "mtime": version.mtime}
        yield row


def _corruption(
    slides: Sequence[CohortSlide], statuses: Sequence[SlideStatus], torn: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    for slide, status in zip(slides, statuses, strict=True):
        known = {"slide_id": slide.slide_id, "uri": slide.uri, "key": status.key}
        if _category(status) in BROKEN:
            yield {**known, "kind": _category(status), "message": status.reason}
        facts = torn.get(status.key or "")
        if facts is not None:
            edge = round(facts["downsample"] * facts["patch_px"])
            for x, y in facts["bad_tiles"]:
                yield {**known, "kind": "bad-tile", "level": facts["level"], "x": x, "y": y, "edge": edge}
