"""What was decided, act by act: the registry's aliases are no more than what the last one says.

`<root>/release/history/<model>/000001.json` and so on; each is written whole, before any alias moves, by whoever holds
the release's lease. A kill at any moment leaves a last act, and `promotion.project` brings the aliases to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from pipeline.errors import ReleaseError
from pipeline.storage.files import join, list_names, read_json, write_json

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
    number: int = 0
    at: str = ""
    """UTC."""


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


def append(root: str, act: Act) -> Act:
    """Write an act after the last one; as it is written. For the holder of the release's lease."""
    before = last_act(root, act.model)
    number = 1 if before is None else before.number + 1
    whole = replace(act, number=number, at=datetime.now(UTC).isoformat(timespec="seconds"))
    write_json(join(_folder(root, act.model), f"{number:06d}.json"), asdict(whole))
    return whole


def _folder(root: str, model: str) -> str:
    return join(root, "release", "history", model)


def _read(uri: str) -> Act:
    plain = read_json(uri)
    return Act(**{**plain, "why": tuple(plain["why"])})
