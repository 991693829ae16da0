"""What is different since a stage was last done, by name: which slides came, went, changed or have other labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.config.base import fingerprint

SHOWN = 20  # names of each kind; the others are counted
_DIGITS = 8  # of a digest: one slide is compared with itself alone

Items = Mapping[str, Mapping[str, Sequence[str]]]
"""Part of an identity -> digest of each slide's id -> digest of what it is, and of its labels. Records outlive slides,
and what is kept of a patient is erased on demand, so none of them names one."""


def items(identity: Mapping[str, Any]) -> Items:
    """The slides that an identity lists, as rows that begin with an id; labels are `Labels`."""
    return {
        part: {fingerprint(row[0]): _digests(row[1:]) for row in rows}
        for part, rows in identity.items()
        if _lists_slides(rows)
    }


class Labels(dict[str, Any]):
    """The labels in such a row, by task: told apart from what else identifies a slide."""


def changes(part: str, before: Items, now: Items, ids: Iterable[str]) -> str:
    """The part's name, with what happened to its slides where both sides know them; of those in `ids` by name."""
    if part not in before or part not in now:
        return part
    old, new = before[part], now[part]
    both = [name for name in new if name in old]
    happened = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in both if old[name][0] != new[name][0]],
        "relabelled": [name for name in both if old[name][0] == new[name][0] and old[name][1] != new[name][1]],
    }
    names = {fingerprint(slide_id): slide_id for slide_id in ids}
    told = [
        f"{len(those):,} {what}{_shown([names[one] for one in those if one in names], len(those))}"
        for what, those in happened.items()
        if those
    ]
    return f"{part} ({'; '.join(told) or 'in another order'})"


def _shown(names: Sequence[str], count: int) -> str:
    """The first twenty names and how many more there are."""
    if not names:
        return ""
    more = count - min(len(names), SHOWN)
    return f": {', '.join(names[:SHOWN])}" + (f" and {more:,} more" if more else "")


def _lists_slides(rows: object) -> bool:
    return isinstance(rows, list) and all(isinstance(row, list) and row and isinstance(row[0], str) for row in rows)


def _digests(values: Sequence[Any]) -> tuple[str, str]:
    labels = [value for value in values if isinstance(value, Labels)]
    rest = [value for value in values if not isinstance(value, Labels)]
    return fingerprint(rest)[:_DIGITS], fingerprint(labels)[:_DIGITS]
