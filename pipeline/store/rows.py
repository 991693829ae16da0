"""Rows of the catalogue: of a source with what became of it, of a slide with what its commit says; and back. Keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.cohort.table import CohortSlide
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row

STORED = (
    "n_patches", "n_bad_tiles", "patch_px", "level", "downsample", "stride", "mpp", "thumbnail_scale", "imported",
    "context_mpp",
)  # fmt: skip
"""Columns that are fields of `StoredSlide`."""
OUTCOME = ("key", "status", "reason", "n_patches", "n_bad_tiles", "error", "picture")
"""Columns that are fields of `SlideStatus`."""


def asked_digest(slide: CohortSlide, version: SourceVersion | None) -> str:
    """Of all that a source's outcome follows from but the spec: its file's version, and what is given beside it.

    None: the file cannot be reached.
    """
    asked = [slide.uri, slide.mpp, slide.mask, slide.coords, slide.series]
    asked += [None] if version is None else [version.size, version.etag, version.mtime]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def slide_key(digest: str, mpp: float | None, guide: str | None = None, series: int | None = None) -> str:
    """Name of a slide in the store.

    Args:
        digest: of its content.
        mpp: microns per px that it is taken to have.
        guide: digest of the mask and coordinates that say where its patches are.
        series: which image of the file it is, where the file alone does not say (`SlideReader.series`).
    """
    identity = [digest, mpp, guide, series]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def source_row(slide: CohortSlide, version: SourceVersion, status: Mapping[str, Any], left: str | None) -> Row:
    """What a source became.

    Args:
        slide: the source.
        version: of it.
        status: the fields of its `SlideStatus`.
        left: key under which a slide that was given up left files.
    """
    seconds, gib = status["limits"] or (None, None)
    return {
        "kind": "source",
        "asked": asked_digest(slide, version),
        "uri": slide.uri,
        "given_mpp": slide.mpp,
        "mask": slide.mask,
        "coords": slide.coords,
        "series": slide.series,
        **asdict(version),
        **{name: status[name] for name in OUTCOME},
        "max_seconds": seconds,
        "max_gib": gib,
        "left": left,
    }


def slide_row(facts: Mapping[str, Any], pack: str | None = None, place: str | None = None) -> Row:
    """A committed slide.

    Args:
        facts: what its commit says (`slide.json`).
        pack: name of the pack that holds it; None where it has a folder.
        place: where in the pack, as JSON.
    """
    width, height = facts["dimensions"]
    names = (name for name in STORED if name not in {"thumbnail_scale", "imported", "context_mpp"})
    return {
        "kind": "slide",
        "key": facts["key"],
        **{name: facts[name] for name in names},
        "width": width,
        "height": height,
        "thumbnail_scale": facts["thumbnail"]["scale"],
        "imported": facts["grid"] is None,
        "context_mpp": facts["spec"].get("context_mpp"),
        "pack": pack,
        "place": place,
        "facts": compact(facts),
    }


def features_row(facts: Mapping[str, Any], pack: str | None = None, place: str | None = None) -> Row:
    """A slide's committed features; arguments as `slide_row`."""
    known = {name: facts[name] for name in ("key", "n_patches", "dim", "dtype")}
    return {"kind": "slide", **known, "n_bad_tiles": 0, "pack": pack, "place": place, "facts": compact(facts)}


def stored_row(facts: Mapping[str, Any], pack: str | None = None, place: str | None = None) -> Row:
    """`features_row` of a commit of features, `slide_row` of one of patches."""
    return features_row(facts, pack, place) if "encoder" in facts else slide_row(facts, pack, place)


def outcome(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SlideStatus` that a source's row has."""
    limits = None if row["max_seconds"] is None else (row["max_seconds"], row["max_gib"])
    return {**{name: row.get(name) for name in OUTCOME}, "limits": limits}


def stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `StoredSlide` that a slide's row has."""
    return {**{name: row[name] for name in STORED}, "dimensions": (row["width"], row["height"])}


def compact(facts: Mapping[str, Any]) -> str:
    """JSON of facts: equal ones give equal text."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
