"""What an object storage has to do for this room: one seam, and a client behind it for each kind of cloud.

Methods raise what their client raises; `reason` puts it into words. What is absent raises FileNotFoundError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SourceVersion:
    """What tells one state of a file from another without reading it: size and etag (cloud) or mtime (local)."""

    size: int
    """Bytes."""
    etag: str | None
    """The cloud's entity tag without quotes."""
    mtime: float | None
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Found:
    """A file below a folder."""

    uri: str
    size: int
    """Bytes."""
    modified: float
    """When it was last written, s since 1970, by the clock of whoever keeps it."""


class ChangedError(Exception):
    """A file is not what it was when it was read, so it was not replaced."""


class Cloud(Protocol):
    """An object storage."""

    def version(self, uri: str) -> SourceVersion | None:
        """The state of an object; None of a folder."""

    def exists(self, uri: str) -> bool:
        """Whether an object or a folder is there; a bucket that does not exist is an error."""

    def read(self, uri: str) -> bytes:
        """All of an object."""

    def read_ranges(self, uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Of each (start, length), none of them empty; fewer bytes where the object ends."""

    def fetch(self, uri: str) -> tuple[str, bytes]:
        """Entity tag and all bytes, of one state."""

    def write(self, uri: str, data: bytes) -> None:
        """Write it whole."""

    def replace(self, uri: str, data: bytes, tag: str | None) -> str | None:
        """Write it only while it has this entity tag (None: while it is not there); its new tag.

        A storage that refuses such a condition writes, and returns None; one that ignores it writes too.

        Raises:
            ChangedError: it is another.
        """

    def entries(self, uri: str) -> dict[str, SourceVersion | None]:
        """What is directly in a folder, by name; folders have no version."""

    def walk(self, uri: str) -> Iterator[Found]:
        """All objects below a folder, in no order."""

    def delete(self, uri: str) -> None:
        """Remove an object."""

    def download(self, uri: str, path: Path) -> None:
        """Copy an object to a new file."""

    def upload(self, path: Path, uri: str) -> None:
        """Copy a file to an object, whole or not at all."""

    def reason(self, error: Exception, uri: str) -> str | None:
        """Why the client failed and what to do; None where the error is not its own."""

    def is_missing_bucket(self, error: Exception) -> bool:
        """Whether that is why nothing was found."""
