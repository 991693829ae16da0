"""The ledgers of a tiled cohort, as Parquet: what became of each slide, which files there are, what could not be read.

`slides.parquet` has one row for each row of the cohort, in its order; `files.parquet` one for each source and each
stored file; `corruption.parquet` one for each patch that could not be decoded and each slide whose file is broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.columnar import Columnar
from pipeline.schema import CORRUPTION_LEDGER, FILE_LEDGER, SLIDE_LEDGER
from pipeline.storage import files
from pipeline.store.packs import PACKS, pack_sha256, pack_uri
from pipeline.store.patches import PatchStore

BATCH = 16_384  # rows that are Python objects at a time; a million of them would take gigabytes
_OF_COMMITS = ("key", "content", "vendor", "mpp", "width", "height", "level", "rejects", "tissue", "tissue_beyond")
_COMMITS = pa.schema([SLIDE_LEDGER.field(name) for name in _OF_COMMITS])
_ENTRIES = pa.schema([("name", pa.string()), *(FILE_LEDGER.field(n) for n in ("key", "bytes", "sha256", "patches"))])
BROKEN = frozenset({"bad-tiles", "empty-file", "not-a-slide", "truncated", "unopenable", "unreadable"})
"""Reasons that say that a slide's file is damaged, where the others are about what it shows or how it is asked for."""


def write_ledger(store: PatchStore, outcomes: pa.Table, folder: str) -> dict[str, str]:
    """Write the three ledgers into a folder; their URIs by name.

    Args:
        store: where the slides are.
        outcomes: a row for each row of the cohort (`ingest.statuses.outcomes`).
        folder: URI.

    Raises:
        StorageError: the folder cannot be written.
    """
    keys = pc.unique(outcomes["key"]).drop_null()
    commits, stored, torn = _stored(store, keys)
    tables = {
        "slides": (SLIDE_LEDGER, _slides(outcomes, commits)),
        "files": (FILE_LEDGER, chain(_sources(outcomes), _files_of(store, stored), [_packs(store, keys)])),
        "corruption": (CORRUPTION_LEDGER, _tables(_corruption(outcomes, torn), CORRUPTION_LEDGER)),
    }
    uris = {f"ledger_{name}": files.join(folder, f"{name}.parquet") for name in tables}
    for uri, (schema, some) in zip(uris.values(), tables.values(), strict=True):
        files.write_bytes(uri, _parquet(some, schema))
    return uris


def _parquet(tables: Iterable[pa.Table], schema: pa.Schema) -> bytes:
    """A Parquet file of these tables, of which one is held at a time."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    return bytes(sink.getvalue())


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    rest = iter(rows)
    while some := list(islice(rest, BATCH)):
        yield pa.Table.from_pylist(some, schema=schema)


def _stored(store: PatchStore, keys: pa.Array) -> tuple[pa.Table, pa.Table, dict[str, Mapping[str, Any]]]:
    """What the slides' commits say, their files, and the commits that lost patches; in no order."""
    torn: dict[str, Mapping[str, Any]] = {}
    entries: list[pa.Table] = []

    def commits() -> Iterator[Sequence[object]]:
        held: list[dict[str, Any]] = []
        for key, facts in store.all_facts(keys):
            held += _files(key, facts)
            if facts["bad_tiles"]:
                torn[key] = facts
            if len(held) >= BATCH:
                entries.append(pa.Table.from_pylist(held, schema=_ENTRIES))
                held.clear()
            yield _commit(facts)
        entries.append(pa.Table.from_pylist(held, schema=_ENTRIES))

    found = Columnar.of(commits(), _COMMITS, dict).table
    return found, pa.concat_tables(entries), torn


def _commit(facts: Mapping[str, Any]) -> Sequence[object]:
    mask = facts["evidence"]["mask"]
    known = [facts[name] for name in ("key", "content", "vendor", "mpp")]
    rejects = json.dumps(facts["rejects"], sort_keys=True)
    return [*known, *facts["dimensions"], facts["level"], rejects, mask.get("share"), mask.get("beyond")]


def _files(key: str, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "parts" not in facts:  # of a slide in a pack
        return
    for file in (*facts["parts"], facts["index"], facts["thumbnail"], *facts["files"]):
        yield {"key": key, **{name: file.get(name) for name in ("name", "bytes", "sha256", "patches")}}


def _files_of(store: PatchStore, entries: pa.Table) -> Iterator[pa.Table]:
    """The files of slides with folders, in the order of the slides' keys."""
    order = pc.sort_indices(entries["key"])  # which leaves a slide's files as they are
    for start in range(0, len(order), BATCH):
        some = entries.take(order[start : start + BATCH])
        uris = pc.binary_join_element_wise(store.uri, some["key"], some["name"], "/")
        yield _of_files("stored", some.append_column("uri", uris))


def _of_files(role: str, some: pa.Table) -> pa.Table:
    """Rows of the ledger of files, of which some columns are known."""
    columns = {name: some[name] for name in some.column_names} | {"role": pa.repeat(role, len(some))}
    absent = (pa.nulls(len(some), field.type) for field in FILE_LEDGER)
    arrays = [columns.get(field.name, none) for field, none in zip(FILE_LEDGER, absent, strict=True)]
    return pa.table(arrays, names=FILE_LEDGER.names).cast(FILE_LEDGER)


def _packs(store: PatchStore, keys: pa.Array) -> pa.Table:
    """The packs that slides are in, with the patches of those slides."""
    chosen = store.view.slides.select(["pack", "n_patches"]).take(store.view.slide_places(keys).drop_null())
    packed = chosen.filter(pc.is_valid(chosen["pack"])).unify_dictionaries()
    counts = packed.group_by("pack").aggregate([("n_patches", "sum")])
    sizes = {name: version.size for name, version in files.list_versions(files.join(store.uri, PACKS)).items()}
    rows = [
        {
            "role": "stored",
            "uri": pack_uri(store.uri, row["pack"]),
            "bytes": sizes.get(row["pack"]),
            "sha256": pack_sha256(row["pack"]),
            "patches": row["n_patches_sum"],
        }
        for row in sorted(counts.to_pylist(), key=lambda row: str(row["pack"]))
    ]
    return pa.Table.from_pylist(rows, schema=FILE_LEDGER)


def _slides(outcomes: pa.Table, commits: pa.Table) -> Iterator[pa.Table]:
    keys = commits["key"].combine_chunks()
    for start in range(0, len(outcomes), BATCH):
        rows = outcomes.slice(start, BATCH)
        found = commits.take(pc.index_in(rows["key"], value_set=keys))
        columns = {name: found[name] for name in _OF_COMMITS[1:]} | {name: rows[name] for name in rows.column_names}
        columns["rejects"] = pc.fill_null(columns["rejects"], "{}")
        columns |= {"reason": _categories(rows), "message": rows["reason"], "traceback": rows["error"]}
        yield pa.table([columns[name] for name in SLIDE_LEDGER.names], names=SLIDE_LEDGER.names).cast(SLIDE_LEDGER)


def _categories(outcomes: pa.Table) -> pa.ChunkedArray:
    """What stands before the first colon of the reasons."""
    return pc.replace_substring_regex(outcomes["reason"], "(?s):.*", "")


def _sources(outcomes: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(outcomes), BATCH):
        some = outcomes.slice(start, BATCH).select(["slide_id", "uri", "key", "size", "etag", "mtime"])
        yield _of_files("source", some.rename_columns(["slide_id", "uri", "key", "bytes", "etag", "mtime"]))


def _corruption(outcomes: pa.Table, torn: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    categories = _categories(outcomes)
    listed = outcomes.select(["slide_id", "uri", "key", "reason"]).append_column("category", categories)
    lost = pc.is_in(outcomes["key"], value_set=pa.array(torn, pa.string()))
    broken = pc.is_in(categories, value_set=pa.array(sorted(BROKEN)))
    batches = listed.filter(pc.or_(lost, broken)).to_batches(BATCH)
    for row in chain.from_iterable(batch.to_pylist() for batch in batches):
        facts = torn.get(row["key"] or "")
        known = {name: row[name] for name in ("slide_id", "uri", "key")}
        if row["category"] in BROKEN:
            yield {**known, "kind": row["category"], "message": row["reason"]}
        if facts is not None:
            edge = round(facts["downsample"] * facts["patch_px"])
            for x, y in facts["bad_tiles"]:
                yield {**known, "kind": "bad-tile", "level": facts["level"], "x": x, "y": y, "edge": edge}
