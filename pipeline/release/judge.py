"""The stage after training: candidate and champion on the frozen test, the new slides' drift, and the decision."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import cluster
from pipeline.bags.sources import patch_store
from pipeline.cohort.frozen import Manifest, Present, contaminated, draw_up, freeze, newest, present
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StageError, TrackingError
from pipeline.gate.decision import DECISION, decide, software
from pipeline.gate.evidence import Evidence, Finding, TestSlide
from pipeline.release.archive import Case, keep
from pipeline.release.arrivals import Arrivals, Diff, contents, diff, named
from pipeline.release.drift import Sides, View, appearances, find_drift, views
from pipeline.release.history import Act, acts
from pipeline.release.promotion import challenge, decision_folder
from pipeline.release.scoring import Scored, Unscorable, own_config, score, test_sources, try_score
from pipeline.release.trained import Trained, together, write_trained
from pipeline.results.evaluate import write_cases
from pipeline.results.strata import MOST
from pipeline.storage.files import join
from pipeline.storage.scratch import scratch_folder
from pipeline.tracking.registry import RegisteredVersion, add_file, has_version
from pipeline.tracking.tracker import connect
from pipeline.workflow.changes import Labels
from pipeline.workflow.register import enter
from pipeline.workflow.stage import Record, Stage, Workspace, learned

log = logging.getLogger(__name__)

SAME = "same"
"""Verdict on a training that gave the champion itself: nothing to decide."""
SIDE = 200
"""Slides of either side that drift is looked for in; of more, those of the least digests."""


@dataclass(frozen=True)
class Question:
    """What is to be judged, as it stands before training."""

    before: Act | None
    champion: RegisteredVersion | None
    trained: Trained | None
    """The champion's."""
    arrivals: Arrivals
    force: str | None
    taken_back: Mapping[str, str] = field(default_factory=dict)
    """Version, or fingerprint of a training, that a person took back -> who, when and why (`history.taken_back`)."""

    def manifest(self, space: Workspace) -> Manifest:
        """The frozen test: as it was frozen, or drawn up now."""
        config, found = space.config, newest(space.config.storage.root)
        wanted = 1 + config.retrain.refresh_test
        if found is not None and found.version >= wanted:
            return found
        keys = space.records["tile"].keys
        return draw_up(wanted, config.evaluate.split, space.cohort.slides, keys, config.tasks)


def judging(question: Question) -> Stage:
    """The stage that answers a question."""

    def identity(space: Workspace) -> Mapping[str, Any]:
        gate = space.config.gate
        return {
            "train": space.records["train"].fingerprint,
            "lost": _lost(space.records["tile"].metrics),
            "champion": None if question.champion is None else question.champion.uri,
            "manifest": question.manifest(space).digest,
            "gate": None if gate is None else gate.model_dump(mode="json"),
            "evaluate": space.config.evaluate.model_dump(),
            "force": question.force,
            "taken_back": sorted(question.taken_back),
            "slides": _contents(space),
        }

    def work(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
        return _Judgement(question, space, run_id).record(stage_fingerprint)

    return Stage("judge", identity, work, _outdated)


def _outdated(space: Workspace, record: Record) -> str | None:
    """Why a decision that nothing followed yet does not hold: its model was deleted."""
    tracking, version = space.config.tracking, str(record.facts["version"])
    model = str(tracking.model)
    followed = any(act.decision == record.facts.get("decision") for act in acts(space.config.storage.root, model))
    if record.facts["verdict"] == SAME or followed or has_version(connect(str(tracking.uri)), model, version):
        return None
    return f"version {version} of {model} is not in the registry any more"


@dataclass
class _Judgement:
    """One answer."""

    question: Question
    space: Workspace
    run_id: str

    @property
    def config(self) -> Config:
        return self.space.config

    @property
    def keys(self) -> Mapping[str, str]:
        keys: Mapping[str, str] = self.space.records["tile"].keys
        return keys

    @property
    def changed(self) -> Diff:
        """What came since the champion's training; nothing where that is not known."""
        before, now = self.question.trained, self.question.arrivals
        if before is None or before.rows is None:
            return Diff()
        return diff(before.rows, now.rows, before.contents, contents(self.keys))

    def record(self, stage_fingerprint: str) -> Record:
        """Score, decide, and store all of it; no alias of a champion moves here."""
        question, space, tracker = self.question, self.space, self.space.tracker()
        manifest = question.manifest(space)
        freeze(self.config.storage.root, manifest)
        cases = present(manifest, space.cohort.slides, self.keys)
        if not cases:
            raise StageError(
                f"retrain: none of the {len(manifest.cases)} slides of the frozen test, version {manifest.version}, is "
                "in the cohort any more; retrain.refresh_test draws up another"
            )
        train = space.records["train"].fingerprint
        candidate = enter(space, self.run_id, {"train_fingerprint": train}, {}, "Being judged.")
        same = question.champion is not None and question.champion.version == candidate.version
        if not same:
            challenge(self.config, tracker, candidate.version)
        slides, keys = [one.slide for one in cases], {one.slide.slide_id: one.case.key for one in cases}
        space.ray()
        own = own_config(tracker, candidate.uri, self.config)
        scored = score(tracker, candidate, own, test_sources(own, slides, keys))
        if same:
            return self._same(stage_fingerprint, scored, manifest)
        seen = self._learned(train)
        self._keep_cases(scored, cases, seen)
        other = None
        if question.champion is not None:
            other = try_score(tracker, question.champion, self.config, slides, keys)
        sides = self._sides(other)
        drift = None if sides is None else find_drift(sides, self.config.tasks, self.config.seed)
        evidence = self._evidence(manifest, cases, scored, other, seen, drift)
        champion = other if isinstance(other, Scored) else None
        case = Case(evidence, decide(evidence), scored, champion, sides, self._told())
        pages = keep(case, space, self.run_id)
        facts = {"verdict": case.decision["verdict"], "version": candidate.version, "decision": case.name}
        facts |= {"pages": pages, "diff": case.changed["counts"]}  # by name in a table, which is erased with a patient
        outputs = {"decision": join(decision_folder(self.config.storage.root, case.name), DECISION)}
        return Record("judge", stage_fingerprint, outputs, scored.evaluation.metrics, facts)

    def _told(self) -> dict[str, Any]:
        """What people are told of what came."""
        before, now = self.question.trained, self.question.arrivals
        if before is None or before.rows is None:
            return {"counts": {"slides": len(now.rows)}, "slides": {}}
        return {"counts": self.changed.counts, "slides": named(self.changed, now.cohort)}

    def _learned(self, train: str) -> Mapping[str, Sequence[str]] | None:
        """What the candidate has learned from, written down for when it is the champion; None where it is not known."""
        question, space = self.question, self.space
        trained_on = space.stored("train")
        seen = learned([*trained_on, *space.stored("val")])
        if self.config.train.begins_with is not None:
            if self.config.retrain.start != "warm" or question.trained is None:
                return None  # it began with other weights than the champion's, or nothing is known of those
            seen = together(seen, question.trained.learned)
        slides = sorted(fingerprint(slide.slide_id) for slide, _ in trained_on)
        known = Trained(seen, slides, question.arrivals.rows, contents(self.keys))
        write_trained(self.config.storage.root, train, known)
        return seen

    def _keep_cases(self, scored: Scored, cases: Sequence[Present], seen: Mapping[str, Sequence[str]] | None) -> None:
        """Put beside the candidate what its intervals follow from: the test's slides that it has not learned from."""
        without = "retrain: predictions of this version get no intervals by the frozen test: %s"
        if seen is None:
            log.warning(without, "what it has learned from is not known")
            return
        known = set(contaminated(cases, seen))
        ids = {one.slide.slide_id for one in cases if one.case.slide in known}
        if len(ids) == len(cases):
            log.warning(without, "it has learned from all of its slides")
            return
        with scratch_folder() as scratch:
            for place in write_cases(scored.evaluation, str(scratch), ids).values():
                try:
                    add_file(self.space.tracker(), scored.version, Path(place))
                except TrackingError as error:
                    log.warning(without, error)

    def _same(self, stage_fingerprint: str, scored: Scored, manifest: Manifest) -> Record:
        """Nothing was learned anew; what the champion measures on the test is kept, for the test may be a new one."""
        metrics = scored.evaluation.metrics
        self.space.tracker().log_metrics(self.run_id, metrics, 0)
        facts = {"verdict": SAME, "version": scored.version.version, "manifest": manifest.version}
        return Record("judge", stage_fingerprint, {}, metrics, facts)

    def _evidence(
        self,
        manifest: Manifest,
        cases: Sequence[Present],
        scored: Scored,
        other: Scored | Unscorable | None,
        seen: Mapping[str, Sequence[str]] | None,
        drift: tuple[Finding, ...] | None,
    ) -> Evidence:
        question, held, train = self.question, [one.case for one in cases], self.space.records["train"].fingerprint
        champion = None
        if isinstance(other, Scored):
            before = question.trained
            champion = other.predictions(None if before is None else contaminated(cases, before.learned))
        assert self.config.gate is not None  # retrain asks for it
        columns = self._columns([one.slide for one in cases])
        return Evidence(
            manifest={
                "version": manifest.version,
                "digest": manifest.digest,
                "slides": len(cases),
                "patients": len({case.patient for case in held}),
                "missing": len(manifest.cases) - len(cases),
                "relabelled": sum(one.relabelled for one in cases),
                "rescanned": sum(one.rescanned for one in cases),
                "renamed": sum(one.renamed for one in cases),
            },
            tasks=tuple(task.model_dump(mode="json") for task in self.config.tasks),
            slides=tuple(
                TestSlide(
                    one.case.slide,
                    one.case.patient,
                    dict(one.case.labels),
                    {column: one.slide.extra.get(column, "") for column in columns},
                )
                for one in cases
            ),
            candidate=scored.predictions(None if seen is None else contaminated(cases, seen)),
            champion=champion,
            names_champion=None if question.champion is None else question.champion.version,
            unscorable=other.why if isinstance(other, Unscorable) else None,
            taken_back=question.taken_back.get(scored.version.version) or question.taken_back.get(train),
            drift=drift,
            lost=_lost(self.space.records["tile"].metrics),
            gate=self.config.gate.model_dump(mode="json"),
            seed=self.config.seed,
            force=question.force,
            software=software(),
        )

    def _columns(self, slides: Sequence[CohortSlide]) -> list[str]:
        """Columns that part the test into few groups, or that a rule names."""
        assert self.config.gate is not None
        named_by_rules = {column for rule in self.config.gate.strata for column in rule.columns}
        columns = dict.fromkeys(name for slide in slides for name in slide.extra)
        few = [name for name in columns if 2 <= len({slide.extra.get(name, "") for slide in slides}) <= MOST]
        return sorted({*few, *named_by_rules})

    def _sides(self, other: Scored | Unscorable | None) -> Sides | None:
        """New slides and those that the champion learned from; None where one of the two is empty or unknown."""
        before = self.question.trained
        if before is None or self.config.cohort.megapixel_mnist is not None:
            return None
        committed = [slide for slide in self.space.cohort.slides if slide.slide_id in self.keys]
        learned_from = set(before.learned["keys"])
        old = [slide for slide in committed if self.keys[slide.slide_id] in learned_from]
        others = [slide for slide in committed if self.keys[slide.slide_id] not in learned_from]
        if before.rows is not None:
            ids = {*self.changed.added, *self.changed.rescanned}
            new = [slide for slide in others if fingerprint(slide.slide_id) in ids]
        else:
            new = [slide for slide in others if slide.split != self.config.evaluate.split]
        if not new or not old:
            return None
        chosen = [*_some(new), *_some(old)]
        seen = self._views(other, chosen) if isinstance(other, Scored) else None
        found_looks = appearances(patch_store(self.config), chosen, self.keys)
        return Sides(len(_some(new)), tuple(found_looks), seen)

    def _views(self, champion: Scored, slides: Sequence[CohortSlide]) -> tuple[View, ...]:
        sources = test_sources(champion.config, slides, {slide.slide_id: self.keys[slide.slide_id] for slide in slides})
        found = cluster.call(
            views,
            (self.space.tracker(), champion.version.uri, champion.config, tuple(sources)),
            cpus=self.config.cluster.cpus_per_worker,
            gpus=self.config.cluster.gpus_per_worker,
            timeout_s=self.config.cluster.start_timeout_s,
            advice="where memory is short, lower model.select.chunk",
        )
        return tuple(found)


def _lost(counts: Mapping[str, float]) -> dict[str, float]:
    """Shares of what could not be read, over the cohort."""
    patches, bad = counts["patches"], counts["bad_tiles"]
    lost = {"patches": bad / max(1.0, patches + bad), "slides": counts["slides_quarantined"] / counts["slides"]}
    return {name: round(value, 9) for name, value in lost.items()}


def _contents(space: Workspace) -> list[Any]:
    """The committed slides, by what they are: a file that was touched alone is nothing new."""
    keys: Mapping[str, str] = space.records["tile"].keys
    committed = [slide for slide in space.cohort.slides if slide.slide_id in keys]
    return [[s.slide_id, s.patient_id, keys[s.slide_id], dict(s.extra), Labels(s.labels)] for s in committed]


def _some(slides: Sequence[CohortSlide]) -> list[CohortSlide]:
    return sorted(slides, key=lambda slide: fingerprint(slide.slide_id))[:SIDE]
