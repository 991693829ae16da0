"""One slide to its folder: read once, predicted, explained, and all of its files but those that slides share.

The slides of a patient come together where the model takes them so: one prediction, and a folder for each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.bags.images import PastedImage
from pipeline.bags.sources import Source, content_of, open_bag, stored_of
from pipeline.bags.unseen import as_one, read_together, rows_of
from pipeline.cohort.table import CohortSlide
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, DamagedError, SlideError, StageError, StorageError
from pipeline.inference.ensemble import load_any, mean_of, predict_each, spread_of
from pipeline.inference.explain import Explanation, explain
from pipeline.inference.prediction import BagPrediction, bag_scorer, part_of, predict_bag, unpredicted
from pipeline.inference.shards import Cut, Joined
from pipeline.ingest.isolated import apart
from pipeline.ingest.source import opened
from pipeline.model.folder import at_hand, whole_digest
from pipeline.predictions.asked import as_text
from pipeline.predictions.dicom import write_maps
from pipeline.predictions.large import Scored, Shard, cut, scored, together
from pipeline.predictions.maps import METADATA, as_parquet, histograms, map_table
from pipeline.predictions.output import (
    ALL,
    ATTENTION,
    CONTACT,
    SLIDES,
    THUMBNAIL,
    TISSUE,
    TOP,
    Facts,
    Failure,
    Outcome,
    clear,
    commit,
    folder_of,
    safe_name,
)
from pipeline.predictions.sentences import of_one, outputs_line, sentences
from pipeline.predictions.shapes import LEVELS, top_geojson, top_rows, write_all
from pipeline.predictions.sheet import EACH, Shown, sheet_png
from pipeline.storage.files import join, parsed_json, upload, write_bytes
from pipeline.storage.scratch import scratch_folder
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tiling.geojson import collection

log = logging.getLogger(__name__)

Made = TypeVar("Made")

_PASSING = {"crash", "missing", "changed"}
"""Reasons for which a slide that was just predicted has no map, beside those that `SlideError.may_pass` knows."""


@dataclass(frozen=True)
class Job:
    """A slide to predict."""

    slide: CohortSlide
    mpp_remedy: str
    """Where its microns per px can be given."""
    labels: dict[str, str | None]
    identity: str
    """Digest of what its folder follows from."""


@dataclass(frozen=True)
class Predicting:
    """How slides are predicted. Picklable."""

    model: str
    """URI of its folder."""
    source: str
    """What it is called."""
    digest: str
    out: str
    store: str | None
    """Root of the patch store, whose patches are taken where it has them."""
    heads: bool
    all_patches: bool
    dicom: bool
    shard_above: int | None = None
    """Patches of a bag, from which several actors score it."""
    shards: int = 1
    """How many."""

    def worker(self) -> Callable[[Any], Any]:
        """What predicts the slides of a bag, its model loaded; see `Predictor.work`."""
        predictor = Predictor(self)
        predictor.check()
        return predictor.work


class Predictor:
    """The model, loaded; lives as long as its process."""

    def __init__(self, asked: Predicting) -> None:
        self._asked, self._stack = asked, ExitStack()
        self._folder = at_hand(asked.model, self._stack)
        self._members = load_any(self._folder)
        self._model, self._config = self._members[0]
        self._scorers = [bag_scorer(*member) for member in self._members]
        store = asked.store  # looked at once: its catalogue is of all its slides
        self._store = None if store is None else PatchStore(store, self._config.tiling.fingerprint())

    def check(self) -> None:
        """StageError unless the model is the one that the slides' folders will name."""
        if (found := whole_digest(self._folder)) != self._asked.digest:
            raise StageError(
                f"predict: {self._asked.model} holds the model {found}, and not {self._asked.digest} of "
                f"{self._asked.source}; it was changed meanwhile: run again"
            )

    def work(self, item: Sequence[Job] | Shard | Joined[Sequence[Job]]) -> list[Outcome] | Cut[Shard] | Scored | None:
        """Outcomes of a bag, as `predict`; or, of a large one, shards, then their scores, then outcomes."""
        if isinstance(item, Shard):
            (scorer,) = self._scorers
            assert scorer is not None  # mode exact
            return scored(item, self._config, scorer, self._store)
        if isinstance(item, Joined):
            return _each(self._outcome(item.item, partial(self._predict, item.item, item.found)), item.item)
        found: Cut[Shard] | list[Facts] | Failure = self._outcome(item, partial(self._cut_or_predict, item))
        return found if isinstance(found, Cut) else _each(found, item)

    def predict(self, jobs: Sequence[Job]) -> list[Outcome]:
        """What `slide.json` says of each slide of a bag; what is wrong with one of them, for all, instead."""
        return _each(self._outcome(jobs, partial(self._predict, jobs, ())), jobs)

    def _outcome(self, jobs: Sequence[Job], use: Callable[[Sequence[Source]], Made]) -> Made | Failure:
        slides = [job.slide for job in jobs]
        try:
            return read_together(self._config, slides, use, self._store)
        except SlideError as error:
            return Failure(error.reason, as_text(unpredicted(error, jobs[0].mpp_remedy)))
        except DamagedError as error:
            return Failure("damaged", as_text(str(error)))
        except (StorageError, ConfigError, MemoryError):
            raise  # the output's, or this node's: what concerns the slide is a SlideError by now
        except Exception as error:  # one slide's unforeseen failure must not end the others' batch
            log.exception("predict: %s", ", ".join(slide.slide_id for slide in slides))
            return Failure("crash", as_text(f"{type(error).__name__}: {error}"))

    def _cut_or_predict(self, jobs: Sequence[Job], sources: Sequence[Source]) -> Cut[Shard] | list[Facts] | Failure:
        asked, slides = self._asked, [job.slide for job in jobs]
        shards = None
        if asked.shard_above is not None and len(self._members) == 1:
            shards = cut(self._config, slides, as_one(slides, sources), asked.shard_above, asked.shards)
        return shards or self._predict(jobs, (), sources)

    def _predict(
        self, jobs: Sequence[Job], shards: Sequence[Scored | None], sources: Sequence[Source]
    ) -> list[Facts] | Failure:
        """`shards` have the scores of all patches, where several actors scored them."""
        config, whole = self._config, as_one([job.slide for job in jobs], sources)
        bag = open_bag(whole, threads=torch.get_num_threads(), augment=None)
        if len(self._members) > 1:
            each = predict_each(self._members, self._scorers, bag)
            found = mean_of(each, config.tasks)
        else:
            scores, heads = together(shards, whole.key, bag) if shards else None, self._asked.heads
            found = predict_bag(self._model, bag, config, self._scorers[0], heads=heads, pooled=True, scores=scores)
            each = [found]
        numbers = [value for task in config.tasks for value in found.values[task.name].tolist()]
        if not all(map(math.isfinite, numbers)):
            return Failure("not-finite", f"the model gives {numbers}, no finite numbers; its weights are no good")
        explanation, written = explain(self._model, config.tasks, found, whole.key), list[Facts]()
        for job, source, rows in zip(jobs, sources, rows_of(sources), strict=True):
            part, told = part_of(found, rows), None if explanation is None else explanation.of(rows)
            own = {f"member_{n}": one.attention[rows] for n, one in enumerate(each)} if self._of_members else None
            table = map_table(
                source.index(), source.extent, part, told, config, len(found.attention), models=len(each), members=own
            )
            facts = self._facts(job, source, found, explanation, table)
            if len(each) > 1:
                facts["spread"] = {name: list(ends) for name, ends in spread_of(each, config.tasks).items()}
            if len(jobs) > 1:
                _add_patient(facts, jobs, found, part, config.cohort.whole)
            self._write(facts, job.slide, source, table)
            written.append(facts)
        return written

    @property
    def _of_members(self) -> bool:
        """Whether the attention of each of several models is asked for."""
        return self._asked.heads and len(self._members) > 1

    def _facts(
        self, job: Job, source: Source, found: BagPrediction, explanation: Explanation | None, table: pa.Table
    ) -> Facts:
        """What is said of a slide, of which `table` has the maps; the other arguments are of its whole bag."""
        stored, slide, config = stored_of(source), job.slide, self._config
        size, origin = _frame(source, stored, slide, config)
        share = float(found.attention[found.selected].astype(np.float64).sum())
        values = {
            column: value
            for task in config.tasks
            for column, value in zip(task.output_columns, found.values[task.name].tolist(), strict=True)
        }
        return {
            "slide_id": slide.slide_id,
            "uri": as_text(slide.uri),
            "series": slide.series,
            "folder": join(SLIDES, safe_name(slide.slide_id)),
            "dimensions": list(size),
            "mpp": source.mpp,
            "key": source.key,
            "content": content_of(source),
            "origin": list(origin),
            "patch": source.extent,
            "stride": source.extent if stored is None else stored.stride,
            "n_patches": len(table),
            "n_bad_tiles": source.n_bad_tiles,
            "selected": pc.sum(table["selected"]).as_py(),
            "attention_in_selected": round(share, 6),
            "model": {"source": self._asked.source, "digest": self._asked.digest},
            "values": values,
            "labels": {task: label for task, label in job.labels.items() if label is not None},
            "maps": parsed_json("maps", table.schema.metadata[METADATA]),
            "histograms": histograms(table),
            "colours": {},  # `finish` knows them
            "overlay": None,
            "levels": list(LEVELS),
            "sentences": sentences(
                config, len(found.attention), len(found.selected), share, explanation, len(self._members)
            ),
            "curves": None if explanation is None else explanation.curves,
            "identity": job.identity,
        }

    def _write(self, facts: Facts, slide: CohortSlide, source: Source, table: pa.Table) -> None:
        """The slide's files; `slide.json` last, and an earlier one is gone first: it would speak for these files."""
        folder, stored = folder_of(self._asked.out, facts["slide_id"]), stored_of(source)
        clear(folder)
        write_bytes(join(folder, ATTENTION), as_parquet(table))
        write_bytes(join(folder, THUMBNAIL), source.thumbnail())
        write_bytes(join(folder, TISSUE), collection([]) if stored is None else stored.outline())
        write_bytes(join(folder, TOP), top_geojson(facts, table))
        write_bytes(join(folder, CONTACT), _sheet(facts, source, table, self._config))
        if self._asked.all_patches:
            with scratch_folder() as scratch:
                with (scratch / ALL).open("wb") as file:
                    write_all(file, facts, table)
                upload(scratch / ALL, join(folder, ALL))
        if self._asked.dicom:
            facts["dicom"] = self._write_dicom(facts, slide, table)
        commit(folder, facts)

    def _write_dicom(self, facts: Facts, slide: CohortSlide, table: pa.Table) -> dict[str, Any]:
        """What Parametric Maps were written; where a slide can have none, why, and it is predicted all the same.

        Raises:
            SlideError: that may be otherwise the next time; were it committed, nobody would try again.
        """
        columns = {name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)}
        folder = folder_of(self._asked.out, slide.slide_id)
        with scratch_folder() as scratch:
            try:
                names = apart(slide, self._config.tiling, partial(write_maps, slide.uri, facts, columns, scratch))
            except SlideError as error:
                if error.may_pass or error.reason in _PASSING:
                    raise
                log.warning("predict: %s has no DICOM map: %s", slide.slide_id, error)
                return {"files": [], "why": as_text(str(error))}
            for name in names:
                upload(scratch / name, join(folder, name))
        return {"files": names, "why": None}


def _each(found: list[Facts] | Failure, jobs: Sequence[Job]) -> list[Outcome]:
    return [found] * len(jobs) if isinstance(found, Failure) else list(found)


def _add_patient(facts: Facts, jobs: Sequence[Job], found: BagPrediction, part: BagPrediction, whole: str) -> None:
    """What is said of one of several slides, of which `part` is in what was found of all."""
    share = float(part.attention.astype(np.float64).sum())
    facts["patient"] = {
        "patient_id": jobs[0].slide.patient_id,
        "slides": [job.slide.slide_id for job in jobs],
        "n_patches": len(found.attention),
        "selected": len(found.selected),
        "attention": round(share, 6),
    }
    facts["sentences"].insert(1, of_one(whole, len(jobs), share, len(part.selected), len(found.selected)))


def _frame(
    source: Source, stored: StoredSlide | None, slide: CohortSlide, config: Config
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of the slide, and where QuPath counts from, level-0 px."""
    if stored is None:
        assert isinstance(source, PastedImage)
        return (source.grid.width, source.grid.height), (0, 0)
    bounds = stored.facts().get("bounds")
    if bounds is None:  # tiled before commits said it
        bounds = apart(slide, config.tiling, partial(_bounds, slide, config))
    return stored.dimensions, (bounds[0], bounds[1])


def _bounds(slide: CohortSlide, config: Config) -> list[int]:
    with opened(slide, config.tiling) as reader:
        return list(reader.bounds)


def _sheet(facts: Facts, source: Source, table: pa.Table, config: Config) -> bytes:
    score = table["score"].to_numpy()
    most = top_rows(score, EACH)
    least = np.argsort(score, kind="stable")[: max(0, min(EACH, len(score) - len(most)))]
    jpegs = source.payloads(np.concatenate([most, least]))
    labels = [f"#{rank}  {score[row]:.3g}\N{MULTIPLICATION SIGN}" for rank, row in enumerate(most, start=1)]
    labels += [f"row {row}  {score[row]:.3g}\N{MULTIPLICATION SIGN}" for row in least]
    shown = [Shown(jpeg, label) for jpeg, label in zip(jpegs, labels, strict=True)]
    groups = [("Most attended, in multiples of uniform attention", shown[: len(most)])]
    if len(least):
        groups.append(("Least attended", shown[len(most) :]))
    edge = "" if facts["mpp"] is None else f", each {facts['patch'] * facts['mpp']:.3g} \N{MICRO SIGN}m wide"
    values = outputs_line(facts["values"], [column for task in config.tasks for column in task.output_columns])
    return sheet_png([f"{facts['slide_id']}{edge}", facts["model"]["source"], values], groups)
