"""One retraining, from a cohort that changed to a champion: the part that loads torch, Ray and MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cohort.frozen import newest
from pipeline.cohort.frozen import problems as unfit
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, ReleaseError
from pipeline.gate.rules import problems
from pipeline.release.arrivals import Arrivals, contents
from pipeline.release.history import Act, acts, last_act, taken_back
from pipeline.release.judge import SAME, Question, judging
from pipeline.release.promotion import act_on, lease_uri, project, read_decision, settled
from pipeline.release.trained import read_trained, replayed, warmed
from pipeline.storage.files import join
from pipeline.storage.lease import held
from pipeline.tracking.registry import GATED, find_version, tag_model
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.workflow.run import WorkflowResult, run

log = logging.getLogger(__name__)

OUTCOMES = {"promote": "promoted", "hold": "held", "reject": "rejected"}


@dataclass(frozen=True)
class Cycle:
    """How a retraining ended."""

    outcome: str
    """promoted, held, rejected, or nothing to do."""
    why: tuple[str, ...]
    facts: Mapping[str, Any]
    """`decision`, `version`, `champion`, `diff`, `pages`, `run_id`."""
    decision: str | None
    """Digest of the decision; None where there was nothing to decide."""
    whole: bool
    """Whether every slide was reached; where not, the next retraining tries again."""
    contents: Mapping[str, str]
    """Of the slides that are committed (`arrivals.contents`)."""


def retrain_now(config: Config, arrivals: Arrivals, force: str | None) -> Cycle:
    """Tile what is new, train, judge on the frozen test, and let the decision become the registry's aliases.

    Raises:
        ConfigError: the gate's rules do not go with the tasks, or the cohort's columns; or the tasks with the frozen
            test.
        ReleaseError: someone moves the champion beside the decisions.
    """
    assert config.gate is not None  # the caller asks for it
    columns = {name for slide in arrivals.cohort.slides for name in slide.extra}
    wrong, test = problems(config.gate, config.tasks, columns), newest(config.storage.root)
    if test is not None and test.version > config.retrain.refresh_test:  # before it takes hours to find out
        wrong += unfit(test, config.tasks)
    if wrong:
        raise ConfigError("config", wrong)
    root, model = config.storage.root, str(config.tracking.model)
    tracking = config.tracking
    tracker = open_tracking(str(tracking.uri), str(tracking.experiment), join(root, "artifacts"))
    with held(lease_uri(config), f"the release of {model}") as lease:
        before = settled(config, tracker, lease)
    question = _question(config, tracker, before, arrivals, force)
    trained = question.trained
    warm = config.retrain.start == "warm" and question.champion is not None
    if warm and question.champion is not None:
        config = warmed(config, tracker, question.champion)
    choose = replayed(trained, config.retrain.replay if warm else 1.0, config.seed)
    result = run(config, "train", [judging(question)], choose)
    return _concluded(config, tracker, result)


def _question(config: Config, tracker: Tracker, before: Act | None, arrivals: Arrivals, force: str | None) -> Question:
    """What is known before training."""
    champion, root = None, config.storage.root
    if before is not None and before.champion is not None:
        champion = find_version(tracker, f"models:/{config.tracking.model}/{before.champion}")
    train = None if champion is None else champion.tags.get("train_fingerprint")
    trained = read_trained(root, train)
    if champion is not None and trained is None:
        log.warning("retrain: what the champion, version %s, has learned from is not known here", champion.version)
    return Question(before, champion, trained, arrivals, force, taken_back(acts(root, str(config.tracking.model))))


def _concluded(config: Config, tracker: Tracker, result: WorkflowResult) -> Cycle:
    """From the stages' records to aliases; after a kill, the same."""
    root, model, record = config.storage.root, str(config.tracking.model), result.stages["judge"].record
    tiled = result.stages["tile"].record
    whole, holds = not tiled.facts.get("try_again"), contents(tiled.keys)
    facts: dict[str, Any] = {"run_id": result.parent_run_id, "version": record.facts["version"], "decision": None}
    facts |= {"diff": record.facts.get("diff"), "pages": record.facts.get("pages", {})}
    if record.facts["verdict"] == SAME:
        facts |= {"champion": record.facts["version"], "test": dict(record.metrics)}
        return Cycle(
            "nothing to do", ("no slide's content or label changed what is learned",), facts, None, whole, holds
        )
    name = str(record.facts["decision"])
    facts["decision"] = read_decision(root, name)
    with held(lease_uri(config), f"the release of {model}") as lease:
        done = next((act for act in acts(root, model) if act.decision == name), None)
        before = last_act(root, model)
        if done is None:
            _check_names(facts["decision"], before)
            if before is not None:
                project(tracker, before, lease)
            tag_model(tracker, model, {GATED: root})
            done = before = act_on(config, facts["decision"], name, before)
        assert before is not None
        project(tracker, before, lease)
    return Cycle(OUTCOMES[done.kind], done.why, {**facts, "champion": before.champion}, name, whole, holds)


def _check_names(decision: Mapping[str, Any], before: Act | None) -> None:
    """That the champion is the one that the decision compared with."""
    champion = None if before is None else before.champion
    if decision["names_champion"] != champion:
        raise ReleaseError(
            f"version {decision['candidate']['version']} was compared with version {decision['names_champion']}, and "
            f"the champion is {champion or 'nobody'} by now: it was moved while this was judged; run `retrain` again"
        )
