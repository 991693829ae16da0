"""Items too large for one actor of a pool: cut into parts, which whoever is free takes, and joined by one of them.

An actor says that an item is large by what it gives of it, a `Cut`. The parts are then first in line, and once all of
them are there, the item comes back to an actor as `Joined`, with what came of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.errors import StageError
from pipeline.inference.shards import Cut, Joined
from pipeline.results.pool import Room, pooled

Found = TypeVar("Found")


@dataclass
class _Open:
    """A cut item."""

    first: int
    """Place of its first part."""
    count: int
    found: dict[int, Any] = field(default_factory=dict)
    lost: bool = False


def pooled_in_parts(
    make: Callable[[], Callable[[Any], Found]], items: Sequence[Any], room: Room, what: str
) -> Iterator[tuple[int, Found | StageError]]:
    """What comes of each item, by its place; otherwise as `pool.pooled`.

    An item one of whose parts is lost for good gives the StageError that says so.

    Args:
        make: called in each actor; gives the function of an item, of a part, and of what is `Joined`.
        items: those in front begin first.
        room: for the actors; all of them are made, though the items may be fewer.
        what: the work, for messages.
    """
    owner, cut = list(range(len(items))), dict[int, _Open]()

    def then(place: int, found: Any) -> Sequence[Any]:
        """The parts of what is cut; or the item, once the last of its parts is there."""
        own = owner[place]
        if isinstance(found, Cut):
            cut[own] = _Open(len(owner), len(found.parts))
            owner.extend([own] * len(found.parts))
            return found.parts
        if not _is_part(place) or isinstance(found, StageError):
            return ()
        parts = cut[own]
        parts.found[place] = found
        if len(parts.found) < parts.count:
            return ()
        owner.append(own)
        return (Joined(items[own], tuple(parts.found.pop(place) for place in sorted(parts.found))),)

    def _is_part(place: int) -> bool:
        parts = cut.get(owner[place])
        return parts is not None and parts.first <= place < parts.first + parts.count

    for place, found in pooled(make, items, room, what, then):
        own = owner[place]
        if isinstance(found, Cut):
            continue
        if not _is_part(place):
            yield own, found
        elif isinstance(found, StageError) and not cut[own].lost:
            cut[own].lost = True
            yield own, found
