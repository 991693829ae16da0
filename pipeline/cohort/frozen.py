"""The frozen test: which slides models are compared on, by content, whatever happens to the cohort afterwards.

`<root>/release/test-0001.json`, then `-0002` where the test was drawn up anew on purpose. A version never changes. It
names neither slides nor patients but by digests of their ids; the cohort says who they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.cohort.labels import Label, is_label, lacks
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.data import TaskConfig
from pipeline.errors import StageError
from pipeline.storage.files import join, list_names, read_json
from pipeline.storage.once import create_json

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


def draw_up(
    version: int, split: str, slides: Sequence[CohortSlide], keys: Mapping[str, str], tasks: Sequence[TaskConfig]
) -> Manifest:
    """The slides of a split that are committed, in the order of their digests.

    Args:
        version: of the manifest.
        split: which slides.
        slides: all of the cohort, with splits.
        keys: slide id -> content, of those that are committed.
        tasks: that are to be measured on it, for ever.

    Raises:
        StageError: there are none, or nothing of a task shows in them: no test that may be frozen.
    """
    cases = [
        Case(fingerprint(s.slide_id), fingerprint(s.patient_id), keys[s.slide_id], dict(s.labels))
        for s in slides
        if s.split == split and s.slide_id in keys
    ]
    if not cases:
        raise StageError(
            f"retrain: no slide of split {split} is committed, so there is no test to freeze; see the tile stage's "
            "ledger, and bring such slides, or change evaluate.split or cohort.split"
        )
    for task in tasks:
        if (reason := lacks(task, [case.labels[task.name] for case in cases])) is not None:
            found, _, remedy = reason.partition("; ")
            raise StageError(
                f"retrain: the {len(cases)} committed slides of split {split} have {found} of task {task.name}; frozen "
                f"as the test they could never measure it: {remedy}, to that split"
            )
    return Manifest(version, split, tuple(sorted(cases, key=lambda case: case.slide)))


def problems(manifest: Manifest, tasks: Sequence[TaskConfig]) -> list[str]:
    """What of the tasks the frozen labels cannot measure, for a ConfigError."""
    found = []
    remedy = (
        f"go back to the task as it was, or set retrain.refresh_test={manifest.version}, which freezes a test for the "
        "tasks of now and scores the champion on that"
    )
    for number, task in enumerate(tasks):
        frozen = [case.labels[task.name] for case in manifest.cases if task.name in case.labels]
        of, others = (
            f"test {manifest.version}, which was frozen",
            sorted({str(v) for v in frozen if not is_label(task, v)}),
        )
        if len(frozen) < len(manifest.cases):
            known = ", ".join(manifest.cases[0].labels)
            found.append(f"tasks.{number}: {of} for {known}, has no label of task {task.name}; {remedy}")
        elif others:
            shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
            found.append(f"tasks.{number}: {of}, has labels that are none of task {task.name} now: {shown}; {remedy}")
    return found


def newest(root: str) -> Manifest | None:
    """The last version below a root; None where no test was frozen yet."""
    names = [name for name in list_names(join(root, "release")) if name.startswith("test-")]
    return _parse(read_json(join(root, "release", names[-1]))) if names else None


def freeze(root: str, manifest: Manifest) -> str:
    """Write a version, once; its URI.

    Raises:
        StageError: that version was frozen with other slides meanwhile.
    """
    uri = join(root, "release", _NAME.format(manifest.version))
    if not create_json(uri, asdict(manifest)):
        raise StageError(f"{uri} was frozen by another process meanwhile, with other slides; run `retrain` again")
    return uri


def _parse(plain: Mapping[str, Any]) -> Manifest:
    return Manifest(plain["version"], plain["split"], tuple(Case(**case) for case in plain["cases"]))


@dataclass(frozen=True)
class Present:
    """A case as the cohort has it now, under whatever name."""

    case: Case
    slide: CohortSlide
    """With the labels that the manifest froze."""
    relabelled: bool
    """Whether the cohort has other labels for it by now."""
    key: str
    """Of its content by now."""

    @property
    def renamed(self) -> bool:
        """Whether the cohort has its content under another id by now."""
        return fingerprint(self.slide.slide_id) != self.case.slide

    @property
    def rescanned(self) -> bool:
        """Whether its file has another content by now."""
        return self.key != self.case.key


def present(manifest: Manifest, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> list[Present]:
    """The cases whose slides the cohort still has; a patient who was taken out of the cohort is tested on no more.

    A case is the slide of its content, under whatever id; where none has that, the slide of its id, scanned again.
    """
    found = []
    for case, slide in zip(manifest.cases, _holders(manifest, slides, keys), strict=True):
        if slide is not None:
            others = any(slide.labels[task] != case.labels[task] for task in slide.labels.keys() & case.labels.keys())
            frozen = replace(slide, split=manifest.split, labels=dict(case.labels))
            found.append(Present(case, frozen, others, keys[slide.slide_id]))
    return found


def _holders(manifest: Manifest, slides: Sequence[CohortSlide], keys: Mapping[str, str]) -> list[CohortSlide | None]:
    """The slide of each case, no slide twice: by id and content, then by content, then by id."""
    by_id = {fingerprint(slide.slide_id): slide for slide in slides if slide.slide_id in keys}
    by_content: dict[str, list[str]] = {}
    for digest, slide in by_id.items():
        by_content.setdefault(keys[slide.slide_id], []).append(digest)
    found: dict[str, str] = {}
    for ways in (
        lambda case: [case.slide] if case.slide in by_content.get(case.key, ()) else [],
        lambda case: by_content.get(case.key, []),
        lambda case: [case.slide] if case.slide in by_id else [],
    ):
        taken = set(found.values())
        for case in manifest.cases:
            free = [digest for digest in ways(case) if digest not in taken]
            if case.slide not in found and free:
                found[case.slide] = free[0]
                taken.add(free[0])
    return [by_id[found[case.slide]] if case.slide in found else None for case in manifest.cases]


def contaminated(cases: Sequence[Present], learned: Mapping[str, Sequence[str]]) -> list[str]:
    """Digests of the test slides that a model has learned from, by content or by patient, of then or of now."""
    keys, patients = set(learned["keys"]), set(learned["patients"])
    return sorted(
        one.case.slide
        for one in cases
        if not keys.isdisjoint((one.case.key, one.key))
        or not patients.isdisjoint((one.case.patient, fingerprint(one.slide.patient_id)))
    )
