"""What came since the last time, without opening a slide: the cohort's rows, and the versions of its files.

On S3 a request tells of a thousand files. This file and what it imports load neither torch nor Ray nor MLflow, so a
schedule that finds nothing new costs seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version as installed
from typing import Any

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import SlideError, StorageError
from pipeline.ingest.cohorts import listed
from pipeline.ingest.versions import Looked, look_at
from pipeline.storage.files import exists, join, read_json, write_json

Row = tuple[str, str, str, str]
"""Digests of a slide's patient, of its file's version, of what its row says beside, and of its labels."""


@dataclass(frozen=True)
class Arrivals:
    """The cohort as it is now."""

    cohort: Cohort
    rows: Mapping[str, Row]
    """Digest of the slide's id -> its row."""
    there: frozenset[str]
    """Digests of the ids of slides whose file is there."""
    digest: str
    """Of rows and settings: equal where a retraining would end as the last one did."""


@dataclass(frozen=True)
class Diff:
    """What is different between two states of a cohort, in digests of the slides' ids."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    """Under another id than before, where the contents are known: neither added nor removed."""
    relabelled: tuple[str, ...] = ()
    rescanned: tuple[str, ...] = ()
    """Another content under the same id; where one of the two is not known, another file, or a row that says something
    else of it."""
    new_patients: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {
            "added": len(self.added),
            "removed": len(self.removed),
            "renamed": len(self.renamed),
            "relabelled": len(self.relabelled),
            "rescanned": len(self.rescanned),
            "new_patients": self.new_patients,
        }


@dataclass(frozen=True)
class Seen:
    """What the last retraining that ended has seen; `<root>/release/seen.json`."""

    digest: str
    arrived: float
    """When a slide last came, s since 1970: when a retraining first saw it."""
    ended: float
    outcome: str
    decision: str | None
    """Digest of the one that it ended with."""
    rows: Mapping[str, Sequence[str]]


def look(config: Config) -> Arrivals:
    """Read the cohort and ask for the versions of its files.

    Raises:
        CohortError: the cohort's rows are wrong.
        StorageError: the cohort cannot be read, or none of its files be reached.
    """
    cohort = listed(config, config.tasks)
    made = config.cohort.megapixel_mnist is not None
    found: Sequence[Looked | None] = [None] * len(cohort.slides) if made else look_at(cohort.slides, config.tiling)
    away = [one for one in found if isinstance(one, SlideError) and one.may_pass]
    if away and len(away) == len(found):
        raise StorageError(f"none of the cohort's {len(found)} files can be reached, such as: {away[0]}")
    rows: dict[str, Row] = {}
    there: set[str] = set()
    for slide, version in zip(cohort.slides, found, strict=True):
        name = fingerprint(slide.slide_id)
        rows[name] = _row(slide, version)
        if not isinstance(version, SlideError):
            there.add(name)
    return Arrivals(cohort, rows, frozenset(there), fingerprint([_settings(config), sorted(rows.items())]))


def _settings(config: Config) -> dict[str, Any]:
    """What decides how a retraining ends, beside the cohort."""
    plain = config.model_dump(mode="json", include={"embed", "evaluate", "gate", "retrain"})
    del plain["retrain"]["expect_new_within"]
    tracking = config.tracking
    return {
        **plain,
        "recipe": config.recipe(),
        "tiling": config.tiling.fingerprint(),
        "registry": [tracking.uri, tracking.model],
        "software": installed("ips-pipeline"),
    }


def _row(slide: CohortSlide, version: Looked | None) -> Row:
    given = [slide.uri, slide.mpp, slide.series, slide.split, dict(slide.extra), slide.mask, slide.coords]
    known = None if version is None else version.reason if isinstance(version, SlideError) else astuple(version)
    return fingerprint(slide.patient_id), fingerprint(known), fingerprint(given), fingerprint(dict(slide.labels))


def contents(keys: Mapping[str, str]) -> dict[str, str]:
    """Digest of a slide's id -> its content, of slide id -> content as the tile stage has it."""
    return {fingerprint(slide): key for slide, key in keys.items()}


def diff(
    before: Mapping[str, Sequence[str]],
    now: Mapping[str, Sequence[str]],
    held: Mapping[str, str] | None = None,
    holds: Mapping[str, str] | None = None,
) -> Diff:
    """What happened between two states.

    Args:
        before: digest of a slide's id -> its row, of then.
        now: of now.
        held: `contents` of then, as far as they are known.
        holds: of now.
    """
    held, holds = held or {}, holds or {}
    gone = {held[slide]: slide for slide in before if slide not in now and slide in held}
    moved: dict[str, str] = {}
    for slide in now:
        if slide not in before and (of := gone.pop(holds.get(slide, ""), None)) is not None:
            moved[slide] = of
    was = {slide: slide for slide in now if slide in before} | moved
    left = set(moved.values())
    known = {row[0] for row in before.values()} | {now[slide][0] for slide in moved}

    def another(slide: str) -> bool:
        if slide in held and slide in holds:
            return held[slide] != holds[slide]
        return tuple(now[slide][1:3]) != tuple(before[slide][1:3])

    return Diff(
        added=tuple(slide for slide in now if slide not in was),
        removed=tuple(slide for slide in before if slide not in now and slide not in left),
        renamed=tuple(moved),
        relabelled=tuple(slide for slide, of in was.items() if now[slide][3] != before[of][3]),
        rescanned=tuple(slide for slide in was if slide not in moved and another(slide)),
        new_patients=len({row[0] for row in now.values()} - known),
    )


def named(found: Diff, cohort: Cohort) -> dict[str, list[str]]:
    """The slides of a diff by their ids, where the cohort still has them."""
    ids = {fingerprint(slide.slide_id): slide.slide_id for slide in cohort.slides}
    names = ("added", "renamed", "relabelled", "rescanned")
    kinds: dict[str, tuple[str, ...]] = {name: getattr(found, name) for name in names}
    return {kind: sorted(ids[slide] for slide in slides if slide in ids) for kind, slides in kinds.items()}


def last_seen(root: str) -> Seen | None:
    """What the last retraining that ended has seen; None where none has ended."""
    uri = join(root, "release", "seen.json")
    return Seen(**read_json(uri)) if exists(uri) else None


def last_contents(root: str) -> dict[str, str]:
    """`contents` of the last retraining that ended; read only where something is new."""
    uri = join(root, "release", "contents.json")
    found: dict[str, str] = read_json(uri) if exists(uri) else {}
    return found


def remember(root: str, seen: Seen, holds: Mapping[str, str]) -> None:
    """Write it, for the next one; `holds`: `contents`."""
    write_json(join(root, "release", "contents.json"), dict(holds))
    write_json(join(root, "release", "seen.json"), asdict(seen))
