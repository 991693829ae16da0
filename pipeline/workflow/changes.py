"""What is different since a stage was last done, by name: which slides came, went, changed or have other labels."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columnar import Columnar
from pipeline.config.base import fingerprint

SHOWN = 20  # names of each kind; the others are counted
_DIGITS = 8  # of a digest: one slide is compared with itself alone

Items = Mapping[str, str | Mapping[str, Sequence[str]]]
"""Part of an identity -> its slides in their order, in base64 of 16 bytes each: digest of the id, of what the slide is,
and of its labels. Of older releases an object of the same digests. Records outlive slides, and what is kept of a
patient is erased on demand, so none of them names one."""

_SLIDE = np.dtype([("slide", ">u8"), ("what", ">u4"), ("labels", ">u4")])


def items(identity: Mapping[str, Any]) -> dict[str, str]:
    """The slides that an identity lists, as rows that begin with an id; labels are `Labels`."""
    return {part: _written(rows) for part, rows in identity.items() if _lists_slides(rows)}


def slides_of(known: Items, part: str) -> list[str]:
    """The digests of the ids of a part's slides, ascending."""
    return [f"{slide:016x}" for slide in np.sort(_read(known[part])["slide"]).tolist()]


class Labels(dict[str, Any]):
    """The labels in such a row, by task: told apart from what else identifies a slide."""


def changes(part: str, before: Items, now: Items, ids: Iterable[str], *, same_layout: bool = True) -> str:
    """The part's name, with what happened to its slides where both sides know them; of those in `ids` by name.

    Where they are written otherwise than before, which slides there are is all that can be compared: empty where these
    are the same.
    """
    if part not in before or part not in now:
        return part
    old, new = _read(before[part]), _read(now[part])
    _, places, olds = np.intersect1d(new["slide"], old["slide"], return_indices=True)
    order = np.argsort(places)
    both, then = new[places[order]], old[olds[order]]
    same = both["what"] == then["what"]
    happened = {
        "added": new[~np.isin(new["slide"], old["slide"])],
        "removed": old[~np.isin(old["slide"], new["slide"])],
    }
    if same_layout:
        happened |= {"changed": both[~same], "relabelled": both[same & (both["labels"] != then["labels"])]}
    wanted = {slide for those in happened.values() for slide in those["slide"].tolist()}
    names = {number: name for name in ids if wanted and (number := int(fingerprint(name), 16)) in wanted}
    told = [
        f"{len(those):,} {what}{_shown([names[one] for one in those['slide'].tolist() if one in names], len(those))}"
        for what, those in happened.items()
        if len(those)
    ]
    if not told and not same_layout:
        return ""
    return f"{part} ({'; '.join(told) or 'in another order'})"


def _shown(names: Sequence[str], count: int) -> str:
    """The first twenty names and how many more there are."""
    if not names:
        return ""
    more = count - min(len(names), SHOWN)
    return f": {', '.join(names[:SHOWN])}" + (f" and {more:,} more" if more else "")


def _lists_slides(rows: object) -> bool:
    if isinstance(rows, Columnar):
        return True
    return isinstance(rows, list) and all(isinstance(row, list) and row and isinstance(row[0], str) for row in rows)


def _written(rows: Iterable[Sequence[Any]]) -> str:
    data = bytearray()
    for row in rows:
        data += bytes.fromhex(fingerprint(row[0]) + "".join(_digests(row[1:])))
    return base64.b64encode(data).decode()


def _read(slides: str | Mapping[str, Sequence[str]]) -> npt.NDArray[Any]:
    if isinstance(slides, str):
        return np.frombuffer(base64.b64decode(slides), _SLIDE)
    rows = [(int(slide, 16), int(what, 16), int(labels, 16)) for slide, (what, labels) in slides.items()]
    return np.array(rows, _SLIDE)


def _digests(values: Sequence[Any]) -> tuple[str, str]:
    labels = [value for value in values if isinstance(value, Labels)]
    rest = [value for value in values if not isinstance(value, Labels)]
    return fingerprint(rest)[:_DIGITS], fingerprint(labels)[:_DIGITS]
