"""The frozen test: which slides models are compared on, by content, whatever happens to the cohort afterwards.

`<root>/release/test-0001.json`, then `-0002` where the test was drawn up anew on purpose. A version never changes. It
names neither slides nor patients but by digests of their ids; the cohort says who they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.cohort.labels import Label
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.storage.files import join, list_names, read_json, write_json

_NAME = "test-{:04d}.json"


@dataclass(frozen=True)
class Case:
    """One slide of the test."""

    slide: str
    """Digest of the slide's id."""
    patient: str
    """Digest of the patient's id."""
    key: str
    """Of its content."""
    labels: Mapping[str, Label | None]
    """Task -> label, as it was when the test was frozen."""


@dataclass(frozen=True)
class Manifest:
    """One version of the test."""

    version: int
    split: str
    """Of the cohort, which it was taken from."""
    cases: tuple[Case, ...]

    @property
    def digest(self) -> str:
        """Over all of it."""
        return fingerprint(asdict(self))


def draw_up(version: int, split: str, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> Manifest:
    """The slides of a split that are committed, in the order of their digests.

    Args:
        version: of the manifest.
        split: which slides.
        slides: all of the cohort, with splits.
        keys: slide id -> content, of those that are committed.
    """
    cases = [
        Case(fingerprint(s.slide_id), fingerprint(s.patient_id), keys[s.slide_id], dict(s.labels))
        for s in slides
        if s.split == split and s.slide_id in keys
    ]
    return Manifest(version, split, tuple(sorted(cases, key=lambda case: case.slide)))


def newest(root: str) -> Manifest | None:
    """The last version below a root; None where no test was frozen yet."""
    names = [name for name in list_names(join(root, "release")) if name.startswith("test-")]
    return _parse(read_json(join(root, "release", names[-1]))) if names else None


def freeze(root: str, manifest: Manifest) -> str:
    """Write a version, once; its URI."""
    uri = join(root, "release", _NAME.format(manifest.version))
    if _NAME.format(manifest.version) not in list_names(join(root, "release")):
        write_json(uri, asdict(manifest))
    return uri


def _parse(plain: Mapping[str, Any]) -> Manifest:
    return Manifest(plain["version"], plain["split"], tuple(Case(**case) for case in plain["cases"]))


@dataclass(frozen=True)
class Present:
    """A case as the cohort has it now."""

    case: Case
    slide: CohortSlide
    """With the labels that the manifest froze."""
    relabelled: bool
    """Whether the cohort has other labels for it by now."""
    key: str
    """Of its content by now."""

    @property
    def rescanned(self) -> bool:
        """Whether its file has another content by now."""
        return self.key != self.case.key


def present(manifest: Manifest, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> list[Present]:
    """The cases whose slides the cohort still has; a patient who was taken out of the cohort is tested on no more."""
    now = {fingerprint(slide.slide_id): slide for slide in slides}
    found = []
    for case in manifest.cases:
        slide = now.get(case.slide)
        if slide is not None and slide.slide_id in keys:
            others = dict(slide.labels) != dict(case.labels)
            frozen = replace(slide, split=manifest.split, labels=dict(case.labels))
            found.append(Present(case, frozen, others, keys[slide.slide_id]))
    return found


def contaminated(cases: Sequence[Present], learned: Mapping[str, Sequence[str]]) -> list[str]:
    """Digests of the test slides that a model has learned from, by content or by patient, of then or of now."""
    keys, patients = set(learned["keys"]), set(learned["patients"])
    return sorted(
        one.case.slide
        for one in cases
        if not keys.isdisjoint((one.case.key, one.key))
        or not patients.isdisjoint((one.case.patient, fingerprint(one.slide.patient_id)))
    )
