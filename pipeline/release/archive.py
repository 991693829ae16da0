"""What is kept of a decision, before any alias moves: under the root, and in MLflow's parent run.

`<root>/release/decisions/<digest>/` holds the decision, its evidence, pages and tables; the decision is written last,
so what is there is whole. Slides are named in pages and tables alone, which are erased with a patient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.recipe import Config
from pipeline.gate.decision import DECISION, EVIDENCE, decision_bytes, digest
from pipeline.gate.evidence import Evidence
from pipeline.release.drift import Sides, drift_csv
from pipeline.release.history import acts
from pipeline.release.pages import drift_page, gate_page
from pipeline.release.promotion import decision_folder
from pipeline.release.scoring import Scored
from pipeline.results.tables import table_csv
from pipeline.storage.files import join, write_bytes, write_json
from pipeline.tracking.registry import tag_version
from pipeline.tracking.tracker import Tracker
from pipeline.workflow.stage import Workspace, versions


@dataclass(frozen=True)
class Case:
    """A decision with all that people are shown beside."""

    evidence: Evidence
    decision: Mapping[str, Any]
    candidate: Scored
    champion: Scored | None
    """Where it was scored."""
    sides: Sides | None
    """What drift was looked for in."""
    changed: Mapping[str, Any]
    """`counts` of what came since the champion's training by kind, and `slides` of each by their ids."""

    @property
    def name(self) -> str:
        """The decision's digest."""
        return digest(self.decision)


def keep(case: Case, space: Workspace, run_id: str) -> dict[str, str]:
    """Write all of it; the pages' URIs by name.

    Args:
        case: what was decided.
        space: of the run.
        run_id: of the stage, whose parent run shows it.
    """
    folder = decision_folder(space.config.storage.root, case.name)
    pages = _pages(case, space)
    found = {name: page.encode() for name, page in pages.items()} | _tables(case)
    for file, data in found.items():
        write_bytes(join(folder, file), data)
    write_json(join(folder, EVIDENCE), case.evidence.plain())
    write_bytes(join(folder, DECISION), decision_bytes(case.decision))
    _tell(case, space.tracker(), run_id, found)
    _describe(case, space.tracker(), space.config)
    return {page.removesuffix(".html"): join(folder, page) for page in pages}


def _pages(case: Case, space: Workspace) -> dict[str, str]:
    root, model = space.config.storage.root, str(space.config.tracking.model)
    origin = {"versions": versions(), "test": f"version {case.evidence.manifest['version']}"}
    pages = {"candidate.html": case.candidate.page(space.cohort, origin)}
    if case.champion is not None:
        pages["champion.html"] = case.champion.page(space.cohort, origin)
    if case.sides is not None:
        pages["drift.html"] = drift_page(model, case.sides, case.evidence.drift or (), case.evidence.gate["drift"])
    beside = [name.removesuffix(".html") for name in pages]
    pages["gate.html"] = gate_page(model, case.decision, case.name, case.changed, acts(root, model), beside)
    return pages


def _tables(case: Case) -> dict[str, bytes]:
    tables = {"candidate.csv": table_csv(case.candidate.evaluation.predictions), "changes.csv": _changes(case.changed)}
    if case.champion is not None:
        tables["champion.csv"] = table_csv(case.champion.evaluation.predictions)
    if case.sides is not None:
        tables["drift.csv"] = drift_csv(case.sides)
    return tables


def _changes(changed: Mapping[str, Any]) -> bytes:
    """One row a slide that the cohort still has."""
    rows = [(slide, kind) for kind, slides in changed["slides"].items() for slide in slides]
    columns = {"slide_id": [slide for slide, _ in rows], "change": [kind for _, kind in rows]}
    return table_csv(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))


def _tell(case: Case, tracker: Tracker, run_id: str, found: Mapping[str, bytes]) -> None:
    """MLflow's artifacts and tags of the parent run."""
    parent = tracker.latest(run_id)[1].get("mlflow.parentRunId", run_id)
    texts = {file: data.decode() for file, data in found.items()}
    texts |= {DECISION: decision_bytes(case.decision).decode()}
    texts |= {EVIDENCE: json.dumps(case.evidence.plain(), sort_keys=True)}
    for file, text in texts.items():
        tracker.log_text(parent, text, f"release/{file}")
    tracker.set_tags(parent, {"release.verdict": case.decision["verdict"], "release.decision": case.name})


def _describe(case: Case, tracker: Tracker, config: Config) -> None:
    """What a version in the registry says of its decision."""
    decision = case.decision
    manifest, why = decision["manifest"], "; ".join(decision["why"])
    tags = {
        "release.decision": case.name,
        "release.verdict": decision["verdict"],
        "release.manifest": f"{manifest['version']} {manifest['digest']}",
        **{f"release.{kind}": str(count) for kind, count in case.changed["counts"].items()},
    }
    against = f"against version {decision['names_champion']}" if decision["names_champion"] else "without a champion"
    rules = "\n".join(f"- {rule['rule']}: **{rule['outcome']}**, {rule['says']}" for rule in decision["rules"])
    text = (
        f"Judged {against} on version {manifest['version']} of the frozen test ({manifest['slides']} slides of "
        f"{manifest['patients']} patients): **{decision['verdict']}**. {why}.\n\n{rules}\n\n"
        f"Decision {case.name[:16]}, in {decision_folder(config.storage.root, case.name)}"
    )
    tag_version(tracker, str(config.tracking.model), str(decision["candidate"]["version"]), tags, text)
