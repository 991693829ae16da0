"""`retrain`: what a schedule calls. Finds out whether anything is new, and only then loads what trains.

It takes no date: the cohort is read as it is, so a retry next morning does what the first try did.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, PipelineError, StageError
from pipeline.release.arrivals import Arrivals, Diff, Seen, diff, last_contents, last_seen, look, remember
from pipeline.release.history import check_reason
from pipeline.release.notify import send_unsent, tell
from pipeline.storage.files import exists, join
from pipeline.storage.lease import Lease, joined

log = logging.getLogger(__name__)

NOTHING, OVERDUE, BUSY = "nothing to do", "overdue", "busy"
EXIT_CODES = {"promoted": 0, NOTHING: 0, BUSY: 0, "rejected": 4, "held": 4, OVERDUE: 6}
"""Outcome -> exit code."""


@dataclass(frozen=True)
class Result:
    """How a retraining ended, as `--json` prints it."""

    outcome: str
    why: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """Of the program."""
        return EXIT_CODES[self.outcome]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"outcome": self.outcome, "exit_code": self.exit_code, "why": list(self.why), **self.facts}


def retrain(config: Config, force: str | None = None, now: Callable[[], float] = time.time) -> Result:
    """Train again where the cohort changed, and let the gate decide whether the new model replaces the champion.

    Args:
        config: with a `gate`.
        force: why a model that would be held is to be promoted; written into its decision.
        now: the clock, s since 1970.

    Raises:
        ConfigError: no gate is set, or the config is wrong otherwise.
        ReleaseError: `force` says nothing.
        PipelineError: a stage fails; the file and the server of `notify` are told of that too.
    """
    if config.cohort.bag == "patient":
        problem = "cohort.bag: patient: `retrain` compares and watches slide by slide; use `run`, or cohort.bag=slide"
        raise ConfigError("config", [problem])
    if config.gate is None:
        problem = "gate: is required to retrain: no model is promoted unseen; set gate=standard"
        raise ConfigError(f"config {config.name}", [problem])
    check_reason(force)
    root, url = config.storage.root, config.notify.url
    with joined(join(root, "release", "retrain.lease"), f"retraining of {config.name}") as lease:
        if lease is None:
            return Result(BUSY, ("another retraining is at work below this root",), {"root": root})
        send_unsent(root, url)
        try:
            result = _retrain(config, force, now(), lease)
        except PipelineError as error:
            message = {"outcome": "failed", "error": type(error).__name__, "message": str(error)}
            tell(root, url, {**message, "exit_code": error.exit_code, "root": root})
            raise
        if result.outcome == BUSY:
            return result
        told = {**result.plain(), "ended": now()}
        tell(root, url if result.outcome != NOTHING else None, told)
        return result


def _retrain(config: Config, force: str | None, now: float, lease: Lease) -> Result:
    _write_made_cohort(config)
    root, arrivals, seen = config.storage.root, look(config), last_seen(config.storage.root)
    if seen is not None and seen.digest == arrivals.digest and force is None:
        facts = {"root": root, "last": seen.outcome, "slides": len(seen.rows)}
        return _nothing(
            config, seen.arrived, now, "no slide, label or setting has changed since the last retraining", facts
        )
    try:
        lease.check()
    except StageError as lost:  # two of a schedule began in the same moment, and the other one wrote its claim last
        return Result(BUSY, (str(lost),), {"root": root})
    before = seen.rows if seen else {}
    log.info("retrain: since the last one that ended: %s", _told(diff(before, arrivals.rows)))
    from pipeline.release.cycle import retrain_now

    cycle = retrain_now(config, arrivals, force)
    digest = arrivals.digest if cycle.whole else ""
    found = diff(before, arrivals.rows, last_contents(root), cycle.contents)  # a slide that was renamed did not come
    arrived = now if seen is None or _came(found, arrivals) else seen.arrived
    remember(root, Seen(digest, arrived, now, cycle.outcome, cycle.decision, arrivals.rows), cycle.contents)
    if seen is not None and cycle.decision is not None and cycle.decision == seen.decision:
        why = f"what changed is of the same content as before, and the last model was {cycle.outcome}"
        return _nothing(config, arrived, now, why, {"root": root, "since_last": found.counts, "last": cycle.outcome})
    facts = {"root": root, "since_last": found.counts, **cycle.facts}
    if cycle.outcome == NOTHING:
        return _nothing(config, arrived, now, "; ".join(cycle.why), facts)
    return Result(cycle.outcome, cycle.why, facts)


def _write_made_cohort(config: Config) -> None:
    """Where the config makes its cohort itself, and it is not there yet."""
    made = config.cohort.demo is not None or config.cohort.megapixel_mnist is not None
    if made and not exists(config.cohort.uri):
        from pipeline.workflow.run import ensure_cohort

        ensure_cohort(config)


def _nothing(config: Config, arrived: float, now: float, why: str, facts: dict[str, Any]) -> Result:
    """Nothing to do; unless a slide was expected by now, also where one that cannot be reached has all tried again."""
    expected = config.retrain.expected_s
    if expected is not None and now - arrived > expected:
        days = (now - arrived) / 86_400
        why = (
            f"no new slide has come for {days:.1f} days, and one was expected within "
            f"{config.retrain.expect_new_within}: look at what fills {config.cohort.uri}"
        )
        return Result(OVERDUE, (why,), facts)
    return Result(NOTHING, (why,), facts)


def _came(found: Diff, arrivals: Arrivals) -> bool:
    """Whether a slide came whose file is there: a row alone is no arrival."""
    return any(slide in arrivals.there for slide in (*found.added, *found.rescanned))


def _told(found: Diff) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found.counts.items() if count) or "settings"
