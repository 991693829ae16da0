"""What was decided, act by act: the registry's aliases are no more than what the last one says.

`<root>/release/history/<model>/000001.json` and so on; each is written whole and once, before any alias moves, by
whoever holds the release's lease. An act names the one it follows by its number: of two that follow the same one, the
second is refused. A kill at any moment leaves a last act, and `promotion.project` brings the aliases to it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from pipeline.errors import ReleaseError
from pipeline.storage.files import join, list_names, read_json
from pipeline.storage.once import create_json

Kind = Literal["adopt", "promote", "hold", "reject", "approve", "rollback"]


@dataclass(frozen=True)
class Act:
    """One act, and who is who after it."""

    kind: Kind
    model: str
    was: str | None
    """The champion before it; it must still be that, or be the new one, when the aliases move."""
    champion: str | None
    previous: str | None
    challenger: str | None
    """The version that waits for a person."""
    candidate: str | None
    """The version that it is about."""
    decision: str | None
    """Digest of the decision that it follows."""
    why: tuple[str, ...]
    by: str
    """Who did it: `retrain`, or a person."""
    train: str | None = None
    """Fingerprint of the candidate's training, where a decision names it."""
    number: int = 0
    at: str = ""
    """UTC."""
    token: str = ""
    """Of the writing: tells two acts of one number apart."""

    @property
    def name(self) -> str:
        """Which writing of which act: what a registry's tag says that its aliases were brought to."""
        return f"{self.number} {self.at} {self.token}"


def check_reason(reason: str | None) -> None:
    """Raise a ReleaseError where a reason is given that says nothing."""
    if reason is not None and not reason.strip():
        raise ReleaseError("a reason is kept for those who ask later; say one")


def acts(root: str, model: str) -> list[Act]:
    """All acts below a root on a registered model, the first one first."""
    folder = _folder(root, model)
    return [_read(join(folder, name)) for name in list_names(folder)]


def last_act(root: str, model: str) -> Act | None:
    """The last one; None where there is none."""
    folder = _folder(root, model)
    names = list_names(folder)
    return _read(join(folder, names[-1])) if names else None


def append(root: str, act: Act, before: Act | None) -> Act:
    """Write an act after the one that it was made up from; as it is written. For the holder of the release's lease.

    Raises:
        ReleaseError: another process, which took this one for dead, has written one after the same act.
    """
    number, at = 1 if before is None else before.number + 1, datetime.now(UTC).isoformat(timespec="seconds")
    whole = replace(act, number=number, at=at, token=uuid.uuid4().hex[:12])
    uri = join(_folder(root, act.model), f"{number:06d}.json")
    if not create_json(uri, asdict(whole)):
        raise ReleaseError(
            f"{uri} was written by another process, while nothing was heard of this one: what was to follow act "
            f"{number - 1} does not hold any more; look at `release status`, and run the same command again"
        )
    return whole


def taken_back(done: Sequence[Act]) -> dict[str, str]:
    """Champions that a person took back, and nobody has let in again since -> who, when and why.

    By version, and by the fingerprint of the training where a decision names it: the same weights may be entered again.

    Args:
        done: all acts on a model, the first one first.
    """
    found: dict[str, str] = {}
    trains: dict[str | None, str] = {}
    for act in done:
        if act.train is not None:
            trains[act.candidate] = act.train
        if act.kind == "rollback" and act.was is not None:
            says = f"version {act.was} was taken back by {act.by} on {act.at[:10]}: {'; '.join(act.why)}"
            found |= dict.fromkeys((act.was, trains.get(act.was, act.was)), says)
        if act.kind in ("approve", "rollback") and act.champion is not None:
            found.pop(act.champion, None)
            found.pop(trains.get(act.champion, ""), None)
    return found


def _folder(root: str, model: str) -> str:
    return join(root, "release", "history", model)


def _read(uri: str) -> Act:
    plain = read_json(uri)
    return Act(**{**plain, "why": tuple(plain["why"])})
