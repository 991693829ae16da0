"""The gate: from evidence to a decision, as a pure function whose bytes anyone can compute again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from pipeline.config.release import Action, GateConfig
from pipeline.errors import StageError
from pipeline.gate.evidence import Evidence, Predictions, canonical, parse
from pipeline.gate.rules import Judged, Met, Outcome, figure, outcomes
from pipeline.inference.metrics import MEASURES
from pipeline.storage.files import join, parent, read_bytes

EVIDENCE, DECISION = "evidence.json", "decision.json"
_OTHER = 0.1
"""Share of the frozen test that may be missing, and that may have other labels by now: with more it is another test."""


def decide(evidence: Evidence) -> dict[str, Any]:
    """The decision: every figure, every rule's outcome, the verdict, and why.

    `verdict` is promote, hold or reject. A rule that blocks and is not met rejects; one that holds, or a test that is
    too small for it, holds. `force` turns a hold into a promotion, and is written down; not of a model that a person
    took back.
    """
    gate, judged = GateConfig.model_validate(evidence.gate), Judged(evidence)
    found = [*_integrity(evidence, gate), *outcomes(gate, judged)]
    open_ones = [one for one in found if one.outcome != "met"]
    rejected = [one.says for one in open_ones if one.action == "block"]
    held = [one.says for one in open_ones if one.action == "hold"]
    verdict = "reject" if rejected else "hold" if held else "promote"
    forced = verdict == "hold" and evidence.force is not None and evidence.taken_back is None
    return {
        "evidence": evidence.digest,
        "manifest": dict(evidence.manifest),
        "candidate": _model(judged, evidence.candidate),
        "champion": None if evidence.champion is None else _model(judged, evidence.champion),
        "names_champion": evidence.names_champion,
        "rules": [asdict(one) for one in found],
        "verdict": "promote" if forced else verdict,
        "why": [*rejected, *held] or ["every rule is met"],
        "forced": evidence.force if forced else None,
    }


def decision_bytes(decision: Mapping[str, Any]) -> bytes:
    """As it is stored."""
    return canonical(decision) + b"\n"


def digest(decision: Mapping[str, Any]) -> str:
    """sha256 (hex) of the stored bytes; names the decision."""
    return hashlib.sha256(decision_bytes(decision)).hexdigest()


def software() -> dict[str, str]:
    """Versions of what decides."""
    return {name: version(name) for name in ("ips-pipeline", "numpy", "scipy")}


def replay(uri: str) -> tuple[bytes, str | None]:
    """The decision of a `decision.json` taken again by the evidence beside it; and, where the bytes differ, why.

    Raises:
        StageError: the evidence is not the one that was decided by.
        StorageError: a file cannot be read.
    """
    stored = read_bytes(uri)
    evidence = parse(json.loads(read_bytes(join(parent(uri), EVIDENCE))))
    named = json.loads(stored)["evidence"]
    if named != evidence.digest:
        raise StageError(
            f"{join(parent(uri), EVIDENCE)} has the digest {evidence.digest}, and {uri} was decided by {named}: it is "
            "another file, or was changed; restore it from the run's artifacts in MLflow"
        )
    again, now = decision_bytes(decide(evidence)), software()
    if again == stored:
        return again, None
    others = [
        f"{name} {was}, and this is {now.get(name)}" for name, was in evidence.software.items() if now[name] != was
    ]
    return again, f"it was taken with {'; '.join(others)}" if others else "it was changed, or is of another evidence"


def _model(judged: Judged, of: Predictions) -> dict[str, Any]:
    """A model with what it measures."""
    measures = {
        task.name: {name: figure(judged.measure(task, name, of)) for name in MEASURES[task.kind]}
        for task in judged.tasks.values()
    }
    return {"version": of.version, "train": of.train, "measures": measures}


def _integrity(evidence: Evidence, gate: GateConfig) -> Iterator[Outcome]:
    """What no config turns off: a test that is one, a champion that can be compared with, a person where one is due."""
    for name, found, of in (
        ("missing", "are not in the cohort any more", evidence.manifest["missing"] + len(evidence.slides)),
        ("relabelled", "have another label in the cohort by now", len(evidence.slides)),
    ):
        share = evidence.manifest[name] / of
        met: Met = "met" if share <= _OTHER else "not met"
        remedy = "" if met == "met" else f"; retrain.refresh_test={evidence.manifest['version']} freezes the test anew"
        says = f"{share:.1%} of the frozen test's slides {found}, {_OTHER:.0%} may be{remedy}"
        yield Outcome(f"test {name}", met, "hold", {name: figure(share)}, says)
    if evidence.taken_back is not None:
        ask = f"only `promote --approve {evidence.candidate.version}` makes it champion again"
        yield Outcome("taken back", "not met", "hold", {}, f"{evidence.taken_back}; {ask}")
    seen = evidence.candidate.seen
    yield _contamination("candidate", seen, "hold" if seen is None else "block")
    if evidence.champion is not None:
        yield _contamination("champion", evidence.champion.seen, "hold")
    if evidence.unscorable is not None:
        says = f"the champion, version {evidence.names_champion}, cannot be scored any more: {evidence.unscorable}"
        yield Outcome("champion", "not met", "hold", {}, says)
    if evidence.names_champion is None and gate.first == "hold":
        says = "there is no champion to compare with, and gate.first=hold asks a person"
        yield Outcome("first", "not met", "hold", {}, says)
    if gate.approval:
        yield Outcome("approval", "not met", "hold", {}, "gate.approval asks a person")


def _contamination(who: str, seen: Sequence[str] | None, action: Action) -> Outcome:
    """Whether a model has learned from slides of the test; not met where that is not known."""
    count = None if seen is None else float(len(seen))
    says = f"what the {who} has learned from is not known, so the test may be of it"
    if count is not None:
        says = f"the {who} has learned from {count:.0f} of the test's slides"
    if count and who == "candidate":
        says += ", by content or patient: they have another patient id or split than when the test was frozen"
    return Outcome(f"contamination {who}", "met" if count == 0 else "not met", action, {"slides": count}, says)
