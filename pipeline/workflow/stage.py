"""What a stage is: what identifies it, what it does, and the record that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.bags.patients import OneSlide, by_patient
from pipeline.bags.sources import LabelledSource, open_sources, patch_store, slides_of
from pipeline.cohort.table import Cohort
from pipeline.columnar import selected
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StorageError
from pipeline.ingest.versions import Looked, look_at
from pipeline.storage.files import read_bytes
from pipeline.storage.lease import Lease
from pipeline.store.patches import PatchStore
from pipeline.tracking.tracker import Tracker


@dataclass(frozen=True)
class Record:
    """What a finished stage leaves behind; the JSON of `<stage>-<fingerprint>.json`."""

    stage: str
    fingerprint: str
    outputs: Mapping[str, str]
    """Name -> URI; every one must still exist for the record to count."""
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]
    """What later stages and people need to know: counts, versions, names."""
    run_id: str | None = None
    seconds: float = 0.0

    @property
    def tiled(self) -> pa.Table:
        """Of the tile stage: `slide_id` and `key` of each slide that is committed, in the cohort's order.

        They stand in its ledger; those of generated images, and of records of older releases, in the facts.

        Raises:
            StorageError: the ledger is gone, or is damaged.
        """
        if "keys" in self.facts:
            keys: Mapping[str, str] = self.facts["keys"]
            return pa.table([pa.array(column, pa.string()) for column in (list(keys), list(keys.values()))], _TILED)
        ledger = self.outputs["ledger_slides"]
        try:
            table = pq.read_table(pa.BufferReader(read_bytes(ledger)), columns=_TILED)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{ledger}: no ledger of slides ({error}); delete it, and `tile` writes it anew"
            ) from error
        return table.filter(pc.is_valid(table["key"]))

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Slide id -> key; see `tiled`, which takes a fifth of the memory."""
        return dict(zip(*(column.to_pylist() for column in self.tiled.columns), strict=True))


_TILED = ["slide_id", "key"]


@dataclass
class Workspace:
    """What the stages share during one invocation."""

    config: Config
    cohort: Cohort
    tracker: Callable[[], Tracker]
    ray: Callable[[], None]
    """Joins or starts Ray, once, when a stage first needs it."""
    lineage: Mapping[str, str]
    """Name -> value of what this invocation's results come from."""
    records: dict[str, Record] = field(default_factory=dict)
    lease: Lease | None = None
    """Of the stage that runs: while it stands, no other invocation does the same. None where others do, too."""

    @cached_property
    def versions(self) -> Sequence[Looked]:
        """The state of each slide's files when this invocation first asked."""
        return look_at(self.cohort.slides, self.config.tiling)

    @cached_property
    def store(self) -> PatchStore:
        """The store as it was when a stage first looked at it since one did any work (`look_again`)."""
        return patch_store(self.config)

    def look_again(self) -> None:
        """Forget what the store was: a stage has worked, for hours perhaps."""
        self.__dict__.pop("store", None)

    def stored(self, split: str | None = None) -> Sequence[LabelledSource]:
        """The committed slides of a split, in the cohort's order; by `cohort.bag` those of a patient together."""
        keys, planned = self.records["tile"].keys, self.config.planned
        slides = self.cohort.slides
        mask = [slide.slide_id in keys and (split is None or slide.split == split) for slide in slides]
        versions = selected(self.versions, mask) if planned else None
        found = open_sources(self.config, selected(slides, mask), keys, versions, self.store)
        if self.config.cohort.bag == "slide":
            return found
        pairs = [(slide, source) for slide, source in found if isinstance(source, OneSlide)]
        return by_patient(pairs, self.config.cohort.specimen)


@dataclass(frozen=True)
class Stage:
    """One stage: `identity` needs the records of the stages before it."""

    name: str
    identity: Callable[[Workspace], Mapping[str, Any]]
    work: Callable[[Workspace, str, str], Record]
    """(workspace, fingerprint, MLflow run id) -> record."""
    outdated: Callable[[Workspace, Record], str | None] = lambda _space, _record: None
    """Why a record whose outputs all exist does not hold any more; None where it does."""
    shared: bool = False
    """Several processes may do it at once, on the same inputs, and end with the same outputs."""
    layout: int = 1
    """How `identity` writes its slides; another number, and records of before do not say which slides have changed."""


def versions() -> str:
    """Of what decides a result, for people."""
    names = ("ips-pipeline", "torch", "ray", "mlflow", "openslide-bin")
    return ", ".join(f"{name} {version(name)}" for name in names)


def slide_tags(space: Workspace) -> dict[str, str]:
    """Lineage that is known once the slides are tiled."""
    if "tile" not in space.records:
        return {}
    return {"slide_keys_digest": fingerprint(sorted(space.records["tile"].keys.values()))}


def learned(slides: Sequence[LabelledSource]) -> dict[str, list[str]]:
    """What a model has seen of these slides: content, and digests of the patients' ids, which no record names."""
    patients = {fingerprint(slide.patient_id) for slide, _ in slides}
    return {
        "keys": sorted({one.key for _, source in slides for one in slides_of(source)}),
        "patients": sorted(patients),
    }


def gone_from(store: str, tiled: pa.Table, gone: Callable[[pa.ChunkedArray], Sequence[str]]) -> str | None:
    """Which of the slides (`Record.tiled`) a store does not have, in words; None where it has all."""
    missing = gone(tiled["key"])
    slides = sorted(tiled.filter(pc.is_in(tiled["key"], pa.array(missing, pa.string())))["slide_id"].to_pylist())
    return f"{len(slides)} slides are gone from the {store}: {', '.join(slides[:5])}" if slides else None
