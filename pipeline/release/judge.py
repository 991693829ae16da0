"""The stage after training: candidate and champion on the frozen test, the new slides' drift, and the decision."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import cluster
from pipeline.bags.sources import patch_store
from pipeline.cohort.frozen import Manifest, Present, contaminated, draw_up, freeze, newest, present
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.release.arrivals import Arrivals, diff, named
from pipeline.release.drift import Sides, View, appearances, drift_csv, find_drift, views
from pipeline.release.evidence import Evidence, Finding, TestSlide
from pipeline.release.gate import DECISION, EVIDENCE, decide, decision_bytes, digest, software
from pipeline.release.history import Act, acts
from pipeline.release.pages import drift_page, gate_page
from pipeline.release.promotion import challenge, decision_folder
from pipeline.release.scoring import Scored, Unscorable, own_config, score, test_sources, try_score
from pipeline.release.trained import Trained, together, write_trained
from pipeline.results.strata import MOST
from pipeline.results.tables import table_csv
from pipeline.storage.files import join, write_bytes, write_json
from pipeline.tracking.registry import RegisteredVersion, tag_version
from pipeline.tracking.tracker import Tracker
from pipeline.workflow.changes import Labels
from pipeline.workflow.register import enter
from pipeline.workflow.stage import Record, Stage, Workspace, learned, versions

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

    def manifest(self, space: Workspace) -> Manifest:
        """The frozen test: as it was frozen, or drawn up now."""
        config, found = space.config, newest(space.config.storage.root)
        wanted = 1 + config.retrain.refresh_test
        if found is not None and found.version >= wanted:
            return found
        return draw_up(wanted, config.evaluate.split, space.cohort.slides, space.records["tile"].facts["keys"])


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
            "slides": _contents(space),
        }

    def work(space: Workspace, stage_fingerprint: str, run_id: str) -> Record:
        return _Judgement(question, space, run_id).record(stage_fingerprint)

    return Stage("judge", identity, work)


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
        keys: Mapping[str, str] = self.space.records["tile"].facts["keys"]
        return keys

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
        other = None
        if question.champion is not None:
            other = try_score(tracker, question.champion, self.config, slides, keys)
        sides = self._sides(other)
        drift = None if sides is None else find_drift(sides, self.config.tasks, self.config.seed)
        evidence = self._evidence(manifest, cases, scored, other, self._learned(train), drift)
        return self._stored(stage_fingerprint, evidence, scored, other, sides)

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
        write_trained(self.config.storage.root, train, Trained(seen, slides, question.arrivals.rows))
        return seen

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
        question, held = self.question, [one.case for one in cases]
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
        if before.rows is not None:
            found = diff(before.rows, self.question.arrivals.rows)
            ids = {*found.added, *found.rescanned}
            new = [slide for slide in committed if fingerprint(slide.slide_id) in ids and slide not in old]
        else:
            new = [slide for slide in committed if slide.split != self.config.evaluate.split and slide not in old]
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

    def _stored(
        self,
        stage_fingerprint: str,
        evidence: Evidence,
        scored: Scored,
        other: Scored | Unscorable | None,
        sides: Sides | None,
    ) -> Record:
        """The decision, where it and all that it rests on is kept: under the root, and in MLflow's parent run."""
        decision = decide(evidence)
        name, root, model = digest(decision), self.config.storage.root, str(self.config.tracking.model)
        changed = self._changed()
        origin = {"versions": versions(), "test": f"version {evidence.manifest['version']}"}
        pages = {"candidate.html": scored.page(self.space.cohort, origin)}
        tables = {"candidate.csv": table_csv(scored.evaluation.predictions), "changes.csv": _changes_csv(changed)}
        if isinstance(other, Scored):
            pages["champion.html"] = other.page(self.space.cohort, origin)
            tables["champion.csv"] = table_csv(other.evaluation.predictions)
        if sides is not None:
            rule = evidence.gate["drift"]
            tables["drift.csv"] = drift_csv(sides)
            pages["drift.html"] = drift_page(model, sides, evidence.drift or (), rule)
        pages["gate.html"] = gate_page(model, decision, name, changed, acts(root, model))
        folder = decision_folder(root, name)
        files = {file: page.encode() for file, page in pages.items()} | tables
        for file, data in files.items():
            write_bytes(join(folder, file), data)
        write_json(join(folder, EVIDENCE), evidence.plain())
        write_bytes(join(folder, DECISION), decision_bytes(decision))  # last: what is there is whole
        self._tell(evidence, decision, name, changed, files)
        facts: dict[str, Any] = {"verdict": decision["verdict"], "version": scored.version.version, "decision": name}
        facts["pages"] = {page.removesuffix(".html"): join(folder, page) for page in pages}
        facts["diff"] = changed["counts"]  # by name in a table, which is erased with a patient
        outputs = {"decision": join(folder, DECISION)}
        return Record("judge", stage_fingerprint, outputs, scored.evaluation.metrics, facts)

    def _changed(self) -> dict[str, Any]:
        """What is different since the champion's training."""
        before, now = self.question.trained, self.question.arrivals
        if before is None or before.rows is None:
            return {"counts": {"slides": len(now.rows)}, "slides": {}}
        found = diff(before.rows, now.rows)
        return {"counts": found.counts, "slides": named(found, now.cohort)}

    def _tell(
        self,
        evidence: Evidence,
        decision: Mapping[str, Any],
        name: str,
        changed: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """MLflow's artifacts, tags and description: before any alias moves."""
        tracker, version = self.space.tracker(), str(decision["candidate"]["version"])
        parent = tracker.latest(self.run_id)[1].get("mlflow.parentRunId", self.run_id)
        texts = {file: data.decode() for file, data in files.items()}
        texts |= {DECISION: decision_bytes(decision).decode(), EVIDENCE: json.dumps(evidence.plain(), sort_keys=True)}
        for file, text in texts.items():
            tracker.log_text(parent, text, f"release/{file}")
        tracker.set_tags(parent, {"release.verdict": decision["verdict"], "release.decision": name})
        _describe(tracker, self.config, version, decision, name, changed)


def _describe(
    tracker: Tracker, config: Config, version: str, decision: Mapping[str, Any], name: str, changed: Mapping[str, Any]
) -> None:
    """What a version in the registry says of its decision."""
    manifest, why = decision["manifest"], "; ".join(decision["why"])
    tags = {
        "release.decision": name,
        "release.verdict": decision["verdict"],
        "release.manifest": f"{manifest['version']} {manifest['digest']}",
        **{f"release.{kind}": str(count) for kind, count in changed["counts"].items()},
    }
    against = f"against version {decision['names_champion']}" if decision["names_champion"] else "without a champion"
    rules = "\n".join(f"- {rule['rule']}: **{rule['outcome']}**, {rule['says']}" for rule in decision["rules"])
    text = (
        f"Judged {against} on version {manifest['version']} of the frozen test ({manifest['slides']} slides of "
        f"{manifest['patients']} patients): **{decision['verdict']}**. {why}.\n\n{rules}\n\n"
        f"Decision {name[:16]}, in {decision_folder(config.storage.root, name)}"
    )
    tag_version(tracker, str(config.tracking.model), version, tags, text)


def _lost(counts: Mapping[str, float]) -> dict[str, float]:
    """Shares of what could not be read, over the cohort."""
    patches, bad = counts["patches"], counts["bad_tiles"]
    lost = {"patches": bad / max(1.0, patches + bad), "slides": counts["slides_quarantined"] / counts["slides"]}
    return {name: round(value, 9) for name, value in lost.items()}


def _contents(space: Workspace) -> list[Any]:
    """The committed slides, by what they are: a file that was touched alone is nothing new."""
    keys: Mapping[str, str] = space.records["tile"].facts["keys"]
    committed = [slide for slide in space.cohort.slides if slide.slide_id in keys]
    return [[s.slide_id, s.patient_id, keys[s.slide_id], dict(s.extra), Labels(s.labels)] for s in committed]


def _some(slides: Sequence[CohortSlide]) -> list[CohortSlide]:
    return sorted(slides, key=lambda slide: fingerprint(slide.slide_id))[:SIDE]


def _changes_csv(changed: Mapping[str, Any]) -> bytes:
    """One row a slide that the cohort still has."""
    rows = [(slide, kind) for kind, slides in changed["slides"].items() for slide in slides]
    columns = {"slide_id": [slide for slide, _ in rows], "change": [kind for _, kind in rows]}
    return table_csv(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))
