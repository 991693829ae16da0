"""Drawn splits as they were recorded under a root: patients keep theirs, whatever is drawn by other shares later."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.cohort.table import Cohort
from pipeline.config.base import fingerprint
from pipeline.config.data import SplitConfig
from pipeline.storage.files import exists, join, read_json, write_json

log = logging.getLogger(__name__)

NAME = "splits.json"


@dataclass(frozen=True)
class Recorded:
    """Which split each patient has, by the digest of the id: what is kept of a patient is erased on demand."""

    splits: Mapping[str, str] = field(default_factory=dict)
    drawn_by: Mapping[str, object] | None = None
    """The seed and the shares of the first draw; None where there was none."""

    def split(self, patient_id: str) -> str | None:
        """The patient's; None of a new one."""
        return self.splits.get(fingerprint(patient_id))


def read_recorded(root: str) -> Recorded:
    """What is recorded below a root; empty where nothing is."""
    uri = join(root, NAME)
    return Recorded(**read_json(uri)) if exists(uri) else Recorded()


def record(root: str, cohort: Cohort, shares: SplitConfig, seed: int, before: Recorded) -> None:
    """Add the cohort's patients to what is recorded; nothing is written where all of them are there."""
    now = {fingerprint(slide.patient_id): str(slide.split) for slide in cohort.slides}
    drawn_by: dict[str, object] = {"seed": seed, **shares.model_dump()}
    if before.drawn_by is not None and drawn_by != dict(before.drawn_by):
        log.warning(
            "splits: the recorded patients keep theirs, which were drawn by %s, not %s; for others use another "
            "storage.root, or a split column",
            dict(before.drawn_by),
            drawn_by,
        )
    if now.keys() - before.splits.keys():
        whole = {"splits": {**now, **before.splits}, "drawn_by": dict(before.drawn_by or drawn_by)}
        write_json(join(root, NAME), whole)
