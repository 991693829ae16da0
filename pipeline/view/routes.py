"""What a request asks for. A target is one of a few forms of numbers and fixed names, or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["page", "static", "slides", "slide", "tile", "layer"]

LONGEST = 512  # bytes of a target; ours have some 60
_NUMBER = r"(\d{1,7})"
_FORMS: tuple[tuple[Kind, str], ...] = (
    ("page", r"/"),
    ("static", r"/static/([a-z]+(?:\.[a-z]+)+)"),
    ("slides", r"/slides"),
    ("slide", rf"/([0-9a-f]{{16}})/{_NUMBER}"),
    ("tile", rf"/([0-9a-f]{{16}})/{_NUMBER}/tile/{_NUMBER}/{_NUMBER}/{_NUMBER}"),
    ("layer", rf"/([0-9a-f]{{16}})/{_NUMBER}/layer/{_NUMBER}/{_NUMBER}/{_NUMBER}/{_NUMBER}"),
)
_PATTERNS = tuple((kind, re.compile(form, re.ASCII)) for kind, form in _FORMS)


@dataclass(frozen=True)
class Route:
    """One question."""

    kind: Kind
    name: str = ""
    """Of a file of the page."""
    tag: str = ""
    """Which start of the server made the numbers: a number of an earlier one may mean another slide."""
    numbers: tuple[int, ...] = ()
    """slide; tile: slide, step, column, row; layer: slide, layer, step, column, row."""


def parse(target: str) -> Route | None:
    """What a request's target asks for, without its query; None where it is no question of ours."""
    path = target.partition("?")[0]
    if len(target) > LONGEST:
        return None
    for kind, pattern in _PATTERNS:
        if found := pattern.fullmatch(path):
            parts = found.groups()
            if kind == "static":
                return Route(kind, name=parts[0])
            return Route(kind, tag=parts[0] if parts else "", numbers=tuple(int(part) for part in parts[1:]))
    return None
