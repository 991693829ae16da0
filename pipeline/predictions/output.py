"""The folder of a batch: what its files are called, when a slide's are done, and the tables over all.

`<out>/slides/<name>/slide.json` is written after a slide's other files and is their commit. What is the same for all
slides, as the colours, comes into it at the end.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.data import TaskConfig
from pipeline.errors import DamagedError, StageError
from pipeline.model.calibration import KINDS, Cases, intervals
from pipeline.model.folder import Seen, is_kept
from pipeline.predictions.asked import as_text
from pipeline.predictions.maps import as_parquet
from pipeline.results.tables import table_csv
from pipeline.storage.files import (
    delete,
    is_remote,
    join,
    list_names,
    local_path,
    parsed_json,
    read_if_there,
    write_bytes,
    write_json,
)
from pipeline.storage.tree import delete_folder

log = logging.getLogger(__name__)

SLIDES, MODEL, COMMIT = "slides", "model", "slide.json"
THREADS = 16
"""That read slides' folders."""
ATTENTION, THUMBNAIL, OVERLAY, CONTACT = "attention.parquet", "thumbnail.jpg", "overlay.png", "contact.png"
TOP, TISSUE, ALL = "top.geojson", "tissue.geojson", "all.geojson.gz"

INTERVALS = b"ips.interval"
"""Of the fields of `predictions.parquet` that end in `_low` and `_high`: what they are, for people."""

TESTED = b"ips.tested"
"""Of the same, where a test told them: patients that it had."""

ENDS = ("low", "high")
"""Of the columns `<output>_low` and `_high`: an ensemble's spread, or a model's interval."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")

Facts = dict[str, Any]
"""What `slide.json` says."""


@dataclass(frozen=True)
class Failure:
    """Why a slide has no prediction."""

    reason: str
    """Its category."""
    message: str


Outcome = Facts | Failure


def safe_name(slide_id: str) -> str:
    """A slide id as a file name: unchanged where it is one, else cleaned, with 8 digits of its sha256."""
    if _SAFE_NAME.fullmatch(slide_id):
        return slide_id
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", slide_id)[:80]
    return f"{cleaned}-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def folder_of(out: str, slide_id: str) -> str:
    """Of a slide."""
    return join(out, SLIDES, safe_name(slide_id))


def begun_names(out: str) -> set[str]:
    """Names of the slides' folders that are there, done or not."""
    return set(list_names(join(out, SLIDES)))


def forget_models(out: str, digest: str, used: Path) -> None:
    """Remove copies of models that earlier batches kept below `model` and no slide's folder names any more.

    Whatever else lies there is the user's and stays (`is_kept`), as do the model of this digest and the folder `used`
    that the batch took its model from, with all around and in it. Where a slide's folder does not tell its model, none
    is removed.
    """
    places = [join(out, MODEL, name) for name in list_names(join(out, MODEL)) if name != digest]
    kept = [place for place in places if is_kept(place) and not _meet(place, used)]
    if not kept:
        return  # no slide's folder is read
    with ThreadPoolExecutor(THREADS) as pool:
        said = list(pool.map(read_facts, [join(out, SLIDES, name) for name in begun_names(out)]))
    named = {_model_of(facts) for facts in said if facts is not None}
    if None in named:
        log.warning("predict: slides below %s do not tell of which model they are, so the models kept there stay", out)
        return
    for place in kept:
        if place.rpartition("/")[2] not in named:
            log.info("predict: %s is removed, a copy of a model of which no slide here is any more", place)
            delete_folder(place)


def _model_of(facts: Facts) -> str | None:
    """Digest of the model that a slide was predicted with; None where its facts have another shape."""
    model = facts.get("model")
    return str(model["digest"]) if isinstance(model, dict) and "digest" in model else None


def _meet(uri: str, folder: Path) -> bool:
    """Whether one of both lies within the other."""
    if is_remote(uri):
        return False
    one, other = local_path(uri).resolve(), folder.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def read_facts(folder: str) -> Facts | None:
    """What a slide's folder was committed with; None where it was not, or cannot be read."""
    uri = join(folder, COMMIT)
    data = read_if_there(uri)
    if data is None:
        return None
    try:
        facts = parsed_json(uri, data)
    except DamagedError:
        return None  # it is made again
    return facts if isinstance(facts, dict) else None


def commit(folder: str, facts: Facts) -> None:
    """All other files of the slide are there."""
    write_json(join(folder, COMMIT), facts)


def clear(folder: str) -> None:
    """Take away what is of an earlier prediction of the slide and may not be written again; its commit first."""
    old = [name for name in list_names(folder) if name in (COMMIT, OVERLAY, ALL) or name.endswith(".dcm")]
    for name in sorted(old, key=lambda name: name != COMMIT):
        delete(join(folder, name))


def check_spread(tasks: Sequence[TaskConfig], models: int) -> None:
    """StageError where a column of the spread of several models is called as an output, so that one would be lost."""
    outputs = [name for task in tasks for name in task.output_columns]
    twice = [(name, f"{name}_{end}") for name in outputs for end in ENDS if f"{name}_{end}" in outputs]
    if twice and models > 1:
        told = "; ".join(f"{column}, an output and the spread of {name}" for name, column in twice)
        raise StageError(
            f"predict: the tables would have columns of an ensemble twice: {told}; predict its models alone, or train "
            "with other names of tasks or classes"
        )


def with_intervals(
    outcomes: Sequence[Outcome],
    patients: Sequence[str],
    tasks: Sequence[TaskConfig],
    cases: Mapping[str, Cases],
    seen: Seen | None,
) -> list[Outcome]:
    """The predictions of a model with the intervals that its test tells (`model.calibration`), by output column.

    Without the case that a slide, or its patient, is itself; none of those that the model has learned from.
    """
    most = max((len(own.said) for own in cases.values()), default=0)
    found = list[Outcome]()
    for one, patient in zip(outcomes, patients, strict=True):
        if isinstance(one, Failure):
            found.append(one)
            continue
        # folders of before tell neither
        digests = {Seen.patient(patient), *(one[name] for name in ("key", "content") if name in one)}
        ends = {} if seen is not None and seen.has(digests) else intervals(tasks, cases, one["values"], digests)
        found.append({**one, "intervals": ends, "tested": most})
    return found


def ends_of(facts: Facts, task: TaskConfig, column: str) -> tuple[float, float, str] | None:
    """The ends of a prediction's column, and what they are called; None where it has none."""
    for name, kind in (("spread", "models"), ("intervals", KINDS.get(task.kind, ""))):
        if (ends := facts.get(name, {}).get(column)) is not None:
            return ends[0], ends[1], kind
    return None


def write_tables(
    out: str,
    asked: Sequence[tuple[str, str]],
    outcomes: Sequence[Outcome],
    labels: Sequence[Mapping[str, str | None]],
    tasks: Sequence[TaskConfig],
    patients: Sequence[str | None] | None = None,
) -> list[str]:
    """The tables of all slides; their places.

    Args:
        out: the batch's folder.
        asked: id and URI of each slide, in the order of the rows.
        outcomes: of each.
        labels: of each, task -> what the cohort says, where it says anything.
        tasks: of the model.
        patients: of each slide, where the model predicts patients.
    """
    table = _table(asked, outcomes, labels, tasks, patients)
    places = [join(out, f"predictions.{kind}") for kind in ("parquet", "csv")]
    for place, data in zip(places, (as_parquet(table), table_csv(table)), strict=True):
        write_bytes(place, data)
    return places


def _table(
    asked: Sequence[tuple[str, str]],
    outcomes: Sequence[Outcome],
    labels: Sequence[Mapping[str, str | None]],
    tasks: Sequence[TaskConfig],
    patients: Sequence[str | None] | None,
) -> pa.Table:
    good: list[Facts | None] = [None if isinstance(one, Failure) else one for one in outcomes]
    bad = [one if isinstance(one, Failure) else None for one in outcomes]
    said = dict[str, dict[bytes, str]]()
    tested = {TESTED: str(next((one["tested"] for one in good if one is not None and "tested" in one), 0))}

    def column(kind: pa.DataType, *path: str | int) -> pa.Array:
        found = []
        for facts in good:
            value: Any = facts
            for part in path if facts is not None else ():
                value = value[part]
            found.append(value)
        return pa.array(found, kind)

    columns = {
        "slide_id": pa.array([slide_id for slide_id, _ in asked], pa.string()),
        **({} if patients is None else {"patient_id": pa.array(patients, pa.string())}),
        "uri": pa.array([as_text(uri) for _, uri in asked], pa.string()),
        "folder": column(pa.string(), "folder"),
        "width": column(pa.int64(), "dimensions", 0),
        "height": column(pa.int64(), "dimensions", 1),
        "mpp": column(pa.float64(), "mpp"),
    }
    for task in tasks:
        columns |= {name: column(pa.float64(), "values", name) for name in task.output_columns}
        for name in task.output_columns:
            known = [None if one is None else ends_of(one, task, name) for one in good]
            if (kind := next((one[2] for one in known if one is not None), None)) is not None:
                for end, suffix in enumerate(ENDS):
                    ends = [None if one is None else one[end] for one in known]
                    columns[f"{name}_{suffix}"] = pa.array(ends, pa.float64())
                    said[f"{name}_{suffix}"] = {INTERVALS: kind, **({} if kind == "models" else tested)}
        own = [one.get(task.name) for one in labels]
        if any(label is not None for label in own):
            columns[task.result_columns["label"]] = pa.array(own, pa.string())
    table = pa.table(
        columns
        | {
            "n_patches": pa.array([0 if one is None else one["n_patches"] for one in good], pa.int64()),
            "n_bad_tiles": pa.array([0 if one is None else one["n_bad_tiles"] for one in good], pa.int64()),
            "attention_in_selected": column(pa.float64(), "attention_in_selected"),
            "status": pa.array(["predicted" if one is not None else "failed" for one in good], pa.string()),
            "reason": pa.array([None if one is None else one.reason for one in bad], pa.string()),
            "error": pa.array([None if one is None else one.message for one in bad], pa.string()),
        }
    )
    fields = [one.with_metadata(said[one.name]) if one.name in said else one for one in table.schema]
    return table.cast(pa.schema(fields))
