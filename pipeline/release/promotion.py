"""Who is champion: acts become aliases of MLflow's registry, compared with what was decided against.

MLflow's aliases know no compare-and-set, so all that move them here hold one lease, look before they write and read
back what they wrote. `previous` moves before `champion`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.config.recipe import Config
from pipeline.errors import ReleaseError
from pipeline.gate.decision import DECISION
from pipeline.release.history import Act, acts, append, check_reason, last_act
from pipeline.storage.files import join, read_bytes
from pipeline.storage.lease import Lease, held
from pipeline.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    GATED,
    PLACED,
    PREVIOUS,
    alias_version,
    find_version,
    has_version,
    model_tag,
    point,
    tag_model,
)
from pipeline.tracking.tracker import Store, connect

log = logging.getLogger(__name__)

_BY_THE_GATE = ("promote", "hold", "reject")


def lease_uri(config: Config) -> str:
    """Of the lease that whoever moves aliases holds."""
    return join(config.storage.root, "release", "release.lease")


def decision_folder(root: str, digest: str) -> str:
    """Where a decision lies with all that it rests on."""
    return join(root, "release", "decisions", digest[:16])


def read_decision(root: str, name: str) -> Mapping[str, Any]:
    """A stored decision, by its digest.

    Raises:
        ReleaseError: the file says something else than was decided.
        StorageError: it cannot be read.
    """
    uri = join(decision_folder(root, name), DECISION)
    data = read_bytes(uri)
    if (found := hashlib.sha256(data).hexdigest()) != name:
        raise ReleaseError(
            f"{uri} has the digest {found}, and what was decided has {name}: the file was changed; restore it from the "
            "run's artifacts in MLflow (release/decision.json)"
        )
    decision: Mapping[str, Any] = json.loads(data)
    return decision


def settled(config: Config, store: Store, lease: Lease) -> Act | None:
    """The last act, with the aliases as it says; a champion without any act is adopted. None: there is no champion.

    Raises:
        ReleaseError: someone moved the champion past the decisions, or deleted it.
    """
    root, name = config.storage.root, _name(config)
    act = last_act(root, name)
    if act is not None:
        project(store, act, lease)
        return act
    return _adopted(root, store, name)


def _adopted(root: str, store: Store, name: str) -> Act | None:
    champion = alias_version(store, name, CHAMPION)
    if champion is None:
        return None
    previous, why = alias_version(store, name, PREVIOUS), ("it was champion before any decision was recorded",)
    act = append(root, Act("adopt", name, champion, champion, previous, None, champion, None, why, by="retrain"), None)
    tag_model(store, name, {GATED: root})
    return act


def project(store: Store, act: Act, lease: Lease, *, whoever: bool = False) -> None:
    """Bring the registry's aliases to an act.

    Args:
        store: of the registry.
        act: the last one.
        lease: of the release.
        whoever: also where the champion is neither the one before the act nor the one after it.

    Raises:
        ReleaseError: it is another one, or was deleted; then the other aliases are brought to the act where `whoever`
            is asked for.
    """
    wanted, gone = as_far_as_there(store, act)
    if CHAMPION in gone and not whoever:
        raise ReleaseError(deleted(store, act, gone))
    now = alias_version(store, act.model, CHAMPION)
    done = model_tag(store, act.model, PLACED) == act.name  # then the one before can only be by hand
    if now != act.champion and (done or now != act.was) and not whoever:
        raise ReleaseError(
            f"the champion of {act.model} at {store.uri} is {now or 'nobody'}, and the last decision (act "
            f"{act.number}, {act.at}) says {act.champion or 'nobody'}: someone moved it. `release repair` "
            "goes back to what was decided; `promote --approve VERSION --force REASON` makes another one a decision"
        )
    for alias, version in wanted.items():
        if alias in gone:
            log.warning("release: version %s of %s, %s, was deleted in the registry", gone[alias], act.model, alias)
        if alias_version(store, act.model, alias) != version:
            lease.check()
            point(store, act.model, alias, version)
            log.info("release: %s of %s is %s", alias, act.model, version or "nobody")
    if CHAMPION in gone:
        raise ReleaseError(deleted(store, act, gone))
    if not done:
        tag_model(store, act.model, {PLACED: act.name})


def as_far_as_there(store: Store, act: Act) -> tuple[dict[str, str | None], dict[str, str]]:
    """The aliases as an act says, nobody in place of versions that were deleted; and those versions by alias."""
    wanted = {CHALLENGER: act.challenger, PREVIOUS: act.previous, CHAMPION: act.champion}
    gone = {
        alias: version
        for alias, version in wanted.items()
        if version is not None and not has_version(store, act.model, version)
    }
    return {alias: None if alias in gone else version for alias, version in wanted.items()}, gone


def deleted(store: Store, act: Act, gone: Mapping[str, str]) -> str:
    """That an act's champion is no more, and what to do; `gone`: of `as_far_as_there`."""
    back = (
        ""
        if act.previous is None or PREVIOUS in gone
        else (f"`release rollback --reason WHY` makes version {act.previous}, the champion before, champion again; ")
    )
    return (
        f"version {act.champion} of {act.model}, the champion by the last decision (act {act.number}, {act.at}), is "
        f"not in the registry at {store.uri} any more: someone deleted it. {back}`promote --approve VERSION --force "
        "REASON` makes any other version champion"
    )


def challenge(config: Config, store: Store, version: str) -> None:
    """Let `challenger` point at a version while it is judged; the act that follows says where it points then."""
    with held(lease_uri(config), f"the release of {_name(config)}") as lease:
        lease.check()
        point(store, _name(config), CHALLENGER, version)


def act_on(config: Config, decision: Mapping[str, Any], digest: str, before: Act | None) -> Act:
    """The act that follows a decision, written down; no alias moves yet."""
    candidate, verdict = str(decision["candidate"]["version"]), decision["verdict"]
    was = None if before is None else before.champion
    promoted = verdict == "promote"
    return append(
        config.storage.root,
        Act(
            kind=verdict,
            model=_name(config),
            was=was,
            champion=candidate if promoted else was,
            previous=was if promoted else None if before is None else before.previous,
            challenger=candidate if verdict == "hold" else None,
            candidate=candidate,
            decision=digest,
            why=tuple(decision["why"]),
            by="retrain",
            train=decision["candidate"]["train"],
        ),
        before,
    )


def approve(config: Config, version: str, by: str, force: str | None) -> Act:
    """Make a version champion that waits for a person.

    Args:
        config: of the model.
        version: in the registry.
        by: the person.
        force: why, where no decision allows it.

    Raises:
        ReleaseError: no decision allows it, and no reason was given; or the champion is not the one it names.
        TrackingError: there is no such version.
    """
    check_reason(force)
    root, name = config.storage.root, _name(config)
    with _moving(config) as (store, lease):
        find_version(store, f"models:/{name}/{version}")
        before, now = last_act(root, name), alias_version(store, name, CHAMPION)
        done = [act for act in acts(root, name) if act.kind in _BY_THE_GATE and act.candidate == version]
        decided = done[-1] if done else None
        gone = before is not None and CHAMPION in as_far_as_there(store, before)[1]
        if force is None:
            _check_allowed(root, version, decided, before)
            assert before is not None  # a decision has an act
            if not gone:
                project(store, before, lease)
        was = now if force is not None or before is None else before.champion
        if was == version:
            raise ReleaseError(f"version {version} of {name} is the champion already")
        said = "" if decided is None else f"approved, after the gate said {decided.kind}: {'; '.join(decided.why)}"
        why = (said if force is None else force,)
        digest, train = (decided.decision, decided.train) if decided else (None, None)
        previous = None if gone and force is None else was
        act = Act("approve", name, was, version, previous, None, version, digest, why, by, train)
        act = append(root, act, before)
        tag_model(store, name, {GATED: root})
        project(store, act, lease, whoever=gone)
        return act


def _check_allowed(root: str, version: str, decided: Act | None, before: Act | None) -> None:
    if decided is None or decided.decision is None or before is None:
        raise ReleaseError(
            f"no decision of {root} is about version {version}; `retrain` takes one, or --force REASON promotes it"
        )
    decision = read_decision(root, decided.decision)
    if decision["verdict"] == "reject":
        why = "; ".join(decision["why"])
        raise ReleaseError(f"version {version} was rejected: {why}; --force REASON promotes it all the same")
    if decision["names_champion"] != before.champion:
        raise ReleaseError(
            f"version {version} was compared with version {decision['names_champion'] or 'nobody'}, and the champion "
            f"is {before.champion or 'nobody'} by now; run `retrain` again, or --force REASON"
        )


def rollback(config: Config, by: str, reason: str) -> Act:
    """Make the previous champion champion again; the one that goes becomes `previous`.

    Raises:
        ReleaseError: there is none to go back to, or it was deleted, or no reason is given.
    """
    check_reason(reason)
    root, name = config.storage.root, _name(config)
    with _moving(config) as (store, lease):
        before = last_act(root, name)
        gone = {} if before is None else as_far_as_there(store, before)[1]
        if CHAMPION not in gone:
            before = settled(config, store, lease)
        if before is None or before.previous is None:
            raise ReleaseError(f"{name} has no previous champion to go back to; `promote --approve` takes any version")
        if PREVIOUS in gone:
            raise ReleaseError(
                f"version {before.previous} of {name}, the champion before, is not in the registry at {store.uri} any "
                "more: someone deleted it; `promote --approve VERSION --force REASON` makes any other version champion"
            )
        now, target = before.champion, before.previous
        previous = None if CHAMPION in gone else now
        act = append(root, Act("rollback", name, now, target, previous, None, target, None, (reason,), by), before)
        project(store, act, lease, whoever=CHAMPION in gone)
        return act


def repair(config: Config) -> Act:
    """Bring the aliases to the last act, whoever is champion.

    Raises:
        ReleaseError: nothing was decided yet; or the champion was deleted, and all else is repaired.
    """
    with _moving(config) as (store, lease):
        act = last_act(config.storage.root, _name(config))
        if act is None:
            raise ReleaseError(f"{config.storage.root} holds no decision; `retrain` takes the first one")
        project(store, act, lease, whoever=True)
        return act


@contextmanager
def _moving(config: Config) -> Iterator[tuple[Store, Lease]]:
    """The registry, and the lease to move its aliases."""
    store = connect(str(config.tracking.uri))
    with held(lease_uri(config), f"the release of {_name(config)}") as lease:
        yield store, lease


def _name(config: Config) -> str:
    return str(config.tracking.model)
