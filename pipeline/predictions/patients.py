"""Which slides are predicted together: those of a patient, where the model takes patients; else each alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from pipeline.bags.unseen import of_patient
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.predictions.output import Failure, Outcome
from pipeline.predictions.slide import Job


def bags_of(patients: Sequence[str | None], config: Config) -> list[list[int]]:
    """Places of the slides of each bag, in the order of their first ones; None: a slide alone."""
    groups: dict[Hashable, list[int]] = {}
    for place, patient in enumerate(patients):
        alone = patient is None or config.cohort.bag == "slide"
        groups.setdefault((place,) if alone else patient, []).append(place)
    return list(groups.values())


_VERSION = 1
"""Of what the folders of such a patient hold beside `run._VERSION`: 1: overlays are relative to all of its slides."""


def with_others(jobs: Sequence[Job], bags: Sequence[Sequence[int]]) -> list[Job]:
    """What a slide's folder follows from has its patient's other slides in it."""
    found = list(jobs)
    for bag in bags:
        if len(bag) > 1:
            known = [jobs[place].identity for place in bag]
            for place in bag:
                found[place] = replace(jobs[place], identity=fingerprint([_VERSION, jobs[place].identity, known]))
    return found


def share_outcomes(outcomes: list[Outcome | None], bags: Sequence[Sequence[int]], slide_ids: Sequence[str]) -> None:
    """Where one slide of a bag cannot be used none is predicted, and where one is left to predict all are."""
    for bag in bags:
        own = [outcomes[place] for place in bag]
        why = next(
            (
                Failure(found.reason, of_patient(slide_ids[place], found.message))
                for place, found in zip(bag, own, strict=True)
                if isinstance(found, Failure)
            ),
            None,
        )
        for place, found in zip(bag, own, strict=True):
            if not isinstance(found, Failure) and (why is not None or None in own):
                outcomes[place] = why
