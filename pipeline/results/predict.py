"""Predict slides with a registered model: tables, attention of every patch, a heatmap each."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ips.network.model import IPSModel
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import DamagedError, SlideError, StageError, StorageError
from pipeline.inference.prediction import load_model, predict_slide, unpredicted
from pipeline.ingest import child
from pipeline.model.folder import WEIGHTS
from pipeline.results.heatmaps import GROUP_ROWS, Sketchbook, draw
from pipeline.results.tables import table_csv
from pipeline.schema import ATTENTION
from pipeline.storage.files import absolute
from pipeline.storage.scratch import scratch_folder
from pipeline.tiling.guide import check_environment
from pipeline.tracking.registry import fetch
from pipeline.tracking.tracker import connect

log = logging.getLogger(__name__)

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class _Outcome:
    """One slide: its prediction, or the reason there is none."""

    slide: CohortSlide
    values: dict[str, list[float]]
    n_patches: int
    n_bad_tiles: int
    error: str | None


def predict(
    model: str,
    slides: Sequence[str],
    cohort: str | None,
    out: Path,
    *,
    tracking_uri: str,
    mpp: float | None = None,
    series: int | None = None,
) -> dict[str, Any]:
    """Predict slides by URI, the slides of a cohort, or both.

    Writes into `out`: heatmaps/<slide_id>.png (`safe_name`), attention.parquet (schema ATTENTION, one row a
    patch), and last predictions.parquet and predictions.csv (one row a slide). A slide that cannot be used has
    its reason in the column `error`; the others are predicted.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a folder with weights.safetensors and config.json.
        slides: URIs; the slide's id is its file name without suffix, made unique by a number.
        cohort: URI of a CSV or Parquet with slide_id and uri; labels are not needed.
        out: local folder, made when absent.
        tracking_uri: where the registry is.
        mpp: microns per level-0 px of `slides`, over what their files state.
        series: number of the image to take of each of the `slides`' files; None: the one that is the slide.

    Returns:
        Plain data: the model, the paths written, the number of slides, and slide id -> reason of the failed ones.

    Raises:
        StageError: nothing to predict, or no slide at all could be predicted (the tables are written).
        TrackingError: the model is not found or cannot be fetched.
    """
    listed = read_cohort(cohort).slides if cohort else ()
    named = list(_named(slides, mpp, series, {slide.slide_id for slide in listed}))
    rows = [*named, *listed]
    if not rows:
        raise StageError("predict: no slides; name slide URIs or give --cohort")
    child.start()  # beside the model's loading
    with _loaded(model, tracking_uri) as loaded:
        return _predict(rows, len(named), out, *loaded)


def _predict(
    rows: Sequence[CohortSlide], named: int, out: Path, source: str, network: IPSModel, config: Config
) -> dict[str, Any]:
    """What `predict` writes and returns; the first `named` slides are not of a cohort."""
    check_environment(rows, config.tiling)
    try:
        (out / "heatmaps").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StageError(f"predict: --out {out} is no folder ({error.strerror}); name one") from error
    partial = out / "attention.parquet.part"
    with scratch_folder() as scratch:
        book = Sketchbook(scratch, source)
        with pq.ParquetWriter(partial, ATTENTION, compression="zstd") as writer:
            outcomes = list(_predict_all(network, config, rows, named, book, writer))
        draw(book.sketches, partial, out / "heatmaps")
    partial.replace(out / "attention.parquet")
    table = _table(outcomes, config.tasks)
    pq.write_table(table, out / "predictions.parquet", compression="zstd")
    (out / "predictions.csv").write_bytes(table_csv(table))
    failed = {one.slide.slide_id: one.error for one in outcomes if one.error is not None}
    if len(failed) == len(rows):
        reasons = "\n".join(f"  - {slide_id}: {reason}" for slide_id, reason in failed.items())
        raise StageError(f"predict: none of {len(rows)} slides could be predicted:\n{reasons}")
    names = ("predictions.csv", "predictions.parquet", "attention.parquet", "heatmaps")
    written = {name: str(out / name) for name in names}
    return {"model": source, "slides": len(rows), "failed": failed, "written": written}


def safe_name(slide_id: str) -> str:
    """A slide id as a file name: unchanged where it is one, else cleaned, with 8 digits of its sha256."""
    if _SAFE_NAME.fullmatch(slide_id):
        return slide_id
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", slide_id)[:80]
    return f"{cleaned}-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def _named(uris: Sequence[str], mpp: float | None, series: int | None, taken: set[str]) -> Iterator[CohortSlide]:
    """Slides under their file's name, with the first number that makes it another than those `taken`."""
    for uri in uris:
        stem = _text(PurePosixPath(uri).stem)
        slide_id = next(name for name in chain([stem], (f"{stem}-{n}" for n in count(2))) if name not in taken)
        taken.add(slide_id)
        yield CohortSlide(slide_id, _place(uri), slide_id, None, mpp, {}, {}, series=series)


def _place(uri: str) -> str:
    """The absolute URI; one that means no place as it is, for its slide's error to say so."""
    try:
        return absolute(uri)
    except StorageError:
        return uri


def _text(name: str) -> str:
    """A name as Unicode, which those of files need not be."""
    return name.encode(errors="backslashreplace").decode()


@contextmanager
def _loaded(model: str, tracking_uri: str) -> Iterator[tuple[str, IPSModel, Config]]:
    """The exact version (or folder), and the model; its files stay for the block: what embeds is loaded when needed."""
    if (Path(model) / WEIGHTS).is_file():
        yield str(Path(model).absolute()), *load_model(Path(model))
        return
    with scratch_folder() as scratch:
        version, folder = fetch(connect(tracking_uri), model, scratch)
        log.info("predict: %s is version %s", model, version.version)
        yield version.uri, *load_model(folder)


def _predict_all(
    model: IPSModel,
    config: Config,
    slides: Sequence[CohortSlide],
    named: int,
    book: Sketchbook,
    attention: pq.ParquetWriter,
) -> Iterator[_Outcome]:
    """Predict slide by slide, so that one slide's patches are held at a time."""
    for number, slide in enumerate(slides, start=1):
        try:
            found = predict_slide(model, config, slide)
        except (SlideError, DamagedError) as error:
            mpp = "with --mpp, as in --mpp 0.25" if number <= named else "in the cohort's mpp column"
            reason = _text(unpredicted(error, mpp) if isinstance(error, SlideError) else str(error))
            log.warning("predict: %d/%d %s: %s", number, len(slides), slide.slide_id, reason)
            yield _Outcome(slide, {}, 0, 0, reason)
            continue
        attention.write_table(found.attention, row_group_size=GROUP_ROWS)
        log.info("predict: %d/%d %s: %d patches", number, len(slides), slide.slide_id, len(found.attention))
        values = {task: numbers.tolist() for task, numbers in found.values.items()}
        told = [
            f"{column} {value:.3f}"
            for task in config.tasks
            for column, value in zip(task.output_columns, values[task.name], strict=True)
        ]
        book.add(f"{safe_name(slide.slide_id)}.png", slide.slide_id, told, found)
        yield _Outcome(slide, values, len(found.attention), found.n_bad_tiles, None)


def _table(outcomes: Sequence[_Outcome], tasks: Sequence[TaskConfig]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "slide_id": pa.array([one.slide.slide_id for one in outcomes], pa.string()),
        "uri": pa.array([_text(one.slide.uri) for one in outcomes], pa.string()),
    }
    for task in tasks:
        for k, column in enumerate(task.output_columns):
            values = [one.values[task.name][k] if one.error is None else None for one in outcomes]
            columns[column] = pa.array(values, pa.float64())
    columns["n_patches"] = pa.array([one.n_patches for one in outcomes], pa.int64())
    columns["n_bad_tiles"] = pa.array([one.n_bad_tiles for one in outcomes], pa.int64())
    columns["error"] = pa.array([one.error for one in outcomes], pa.string())
    return pa.table(columns)
