"""The ledgers of a tiled cohort, as Parquet: what became of each slide, which files there are, what could not be read.

`slides.parquet` has one row for each row of the cohort, in its order; `files.parquet` one for each source and each
stored file; `corruption.parquet` one for each patch that could not be decoded and each slide whose file is broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.cohort.table import CohortSlide
from pipeline.schema import CORRUPTION_LEDGER, FILE_LEDGER, SLIDE_LEDGER
from pipeline.storage import files
from pipeline.store.parts import parquet_bytes
from pipeline.store.patches import PatchStore, SlideStatus

THREADS = 16  # they wait on the storage
BROKEN = frozenset({"bad-tiles", "empty-file", "not-a-slide", "truncated", "unopenable", "unreadable"})
"""Reasons that say that a slide's file is damaged, where the others are about what it shows or how it is asked for."""


@dataclass(frozen=True)
class _Entry:
    """One row of the cohort with all that is known of it."""

    slide: CohortSlide
    status: SlideStatus
    facts: Mapping[str, Any]
    """Of the committed slide (`slide.json`); empty without one."""
    version: Mapping[str, Any]
    """Of the source that the status is about; empty where it was not recorded."""

    @property
    def reason(self) -> str | None:
        return None if self.status.reason is None else self.status.reason.partition(":")[0]


def write_ledger(
    store: PatchStore, slides: Sequence[CohortSlide], statuses: Sequence[SlideStatus], folder: str
) -> dict[str, str]:
    """Write the three ledgers into a folder; their URIs by name.

    Args:
        store: where the slides are.
        slides: all rows of the cohort.
        statuses: of each one, in that order.
        folder: URI.

    Raises:
        StorageError: a committed slide is gone, or the folder cannot be written.
    """

    def look_up(slide: CohortSlide, status: SlideStatus) -> _Entry:
        facts = {} if status.key is None else store.facts(status.key)
        return _Entry(slide, status, facts, store.source_version(slide))

    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(look_up, slides, statuses))
    tables = {
        "slides": pa.Table.from_pylist([_slide(entry) for entry in entries], schema=SLIDE_LEDGER),
        "files": pa.Table.from_pylist(list(_files(store, entries)), schema=FILE_LEDGER),
        "corruption": pa.Table.from_pylist(list(_corruption(entries)), schema=CORRUPTION_LEDGER),
    }
    uris = {f"ledger_{name}": files.join(folder, f"{name}.parquet") for name in tables}
    for uri, table in zip(uris.values(), tables.values(), strict=True):
        files.write_bytes(uri, parquet_bytes(table))
    return uris


def _slide(entry: _Entry) -> dict[str, Any]:
    status, facts = entry.status, entry.facts
    width, height = facts.get("dimensions", (None, None))
    mask = facts["evidence"]["mask"] if facts else {}
    return {
        "slide_id": entry.slide.slide_id,
        "patient_id": entry.slide.patient_id,
        "uri": entry.slide.uri,
        "status": status.status,
        "reason": entry.reason,
        "message": status.reason,
        "traceback": status.error,
        "key": status.key,
        "content": facts.get("content"),
        "vendor": facts.get("vendor"),
        "mpp": facts.get("mpp"),
        "width": width,
        "height": height,
        "level": facts.get("level"),
        "n_patches": status.n_patches,
        "n_bad_tiles": status.n_bad_tiles,
        "rejects": json.dumps(facts.get("rejects", {}), sort_keys=True),
        "tissue": mask.get("share"),
        "tissue_beyond": mask.get("beyond"),
    }


def _files(store: PatchStore, entries: Sequence[_Entry]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield {"role": "source", "slide_id": entry.slide.slide_id, "uri": entry.slide.uri, **_version(entry)}
    stored = {entry.status.key: entry.facts for entry in entries if entry.status.key is not None}
    for key, facts in stored.items():
        for file in (*facts["parts"], facts["index"], facts["thumbnail"], *facts["files"]):
            names = ("bytes", "sha256", "patches")
            place = files.join(store.uri, key, file["name"])
            yield {"role": "stored", "key": key, "uri": place, **{name: file.get(name) for name in names}}


def _version(entry: _Entry) -> dict[str, Any]:
    version = entry.version
    return {
        "key": entry.status.key,
        "bytes": version.get("size"),
        "etag": version.get("etag"),
        "mtime": version.get("mtime"),
    }


def _corruption(entries: Sequence[_Entry]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        known = {"slide_id": entry.slide.slide_id, "uri": entry.slide.uri, "key": entry.status.key}
        if entry.reason in BROKEN:
            yield {**known, "kind": entry.reason, "message": entry.status.reason}
        facts = entry.facts
        for x, y in facts.get("bad_tiles", ()):
            edge = round(facts["downsample"] * facts["patch_px"])
            yield {**known, "kind": "bad-tile", "level": facts["level"], "x": x, "y": y, "edge": edge}
