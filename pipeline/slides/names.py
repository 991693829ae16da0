"""What slides are called that nobody has named: as their file or folder, each otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import PurePosixPath


def name_of(uri: str, *, folder: bool) -> str:
    """That of a file without its suffix; that of a folder, whose name may hold dots, as it is."""
    path = PurePosixPath(uri)
    return path.name if folder else path.stem


def apart(names: Iterable[str], taken: set[str]) -> Iterator[str]:
    """Names with the first number from 2 that makes each another than those `taken`, to which it is added."""
    following: dict[str, Iterator[int]] = {}
    for name in names:
        numbers = following.setdefault(name, count(2))
        free = name if name not in taken else next(one for n in numbers if (one := f"{name}-{n}") not in taken)
        taken.add(free)
        yield free
