"""Who is champion as things stand: what the last act says, what the registry has, and what of it is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.config.recipe import Config
from pipeline.gate.decision import DECISION
from pipeline.release.history import Act, acts
from pipeline.release.promotion import as_far_as_there, decision_folder, deleted
from pipeline.storage.files import exists, join
from pipeline.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, alias_version
from pipeline.tracking.tracker import connect


def status(config: Config) -> dict[str, Any]:
    """Who is champion, why, since when, what waits; whether the registry has it so, what is wrong and what helps."""
    root, name, store = config.storage.root, str(config.tracking.model), connect(str(config.tracking.uri))
    registry = {alias: alias_version(store, name, alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    done = acts(root, name)
    last = done[-1] if done else None
    wanted, gone = (registry, {}) if last is None else as_far_as_there(store, last)
    waits = None if last is None or last.challenger is None else {"version": last.challenger, "why": list(last.why)}
    since = _since(done)
    return {
        "model": name,
        "champion": registry[CHAMPION] if last is None or last.champion is None else last.champion,
        "since": None if since is None else since.at,
        "why": [] if since is None else list(since.why),
        "by": None if since is None else since.by,
        "decision": None if since is None else _decision(root, since),
        "waits": waits,
        "registry": registry,
        "agrees": registry == wanted and CHAMPION not in gone,
        "wrong": [
            *([deleted(store, last, gone)] if last is not None and CHAMPION in gone else []),
            *_others(registry, wanted, gone),
        ],
        "last": None if last is None else asdict(last),
    }


def _since(done: list[Act]) -> Act | None:
    """The first act since which the champion is the same."""
    since = None
    for act in done:
        since = act if since is None or act.champion != since.champion else since
    return since


def _decision(root: str, act: Act) -> str | None:
    """The file of the decision that an act follows, where it is there."""
    if act.decision is None:
        return None
    uri = join(decision_folder(root, act.decision), DECISION)
    return uri if exists(uri) else None


def _others(
    registry: Mapping[str, str | None], wanted: Mapping[str, str | None], gone: Mapping[str, str]
) -> Iterator[str]:
    """What is wrong beside a champion that was deleted."""
    for alias, version in gone.items():
        if alias != CHAMPION:
            yield f"{alias}, version {version}, was deleted in the registry, and is nobody now"
    for alias, holder in registry.items():
        if holder != wanted[alias]:
            now, said = holder or "nobody", wanted[alias] or "nobody"
            yield f"{alias} is {now} in the registry, and {said} by the last decision; `release repair` brings it there"
