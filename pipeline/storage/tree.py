"""All that lies below a folder, here or on S3: what is there, away with it, copied to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage import s3
from pipeline.storage.files import failures, is_remote, join, local_path, upload


@dataclass(frozen=True)
class Found:
    """A file below a folder."""

    uri: str
    size: int
    """Bytes."""
    modified: float
    """When it was last written, s since 1970, by the clock of whoever keeps it."""


def walk(uri: str) -> Iterator[Found]:
    """Every file below a folder, unfinished ones included, in the order of their URIs; none where there is no folder.

    On S3 one request for 1,000 files.
    """
    with failures(uri, "list"):
        if is_remote(uri):
            entries = s3.call(uri, "find", s3.key(uri), detail=True)
            found = {f"s3://{name}": (info["size"], info["LastModified"].timestamp()) for name, info in entries.items()}
            yield from (Found(name, *found[name]) for name in sorted(found))
            return
        for folder, folders, names in os.walk(local_path(uri)):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file():  # not gone since
                    stat = path.stat()
                    yield Found(str(path), stat.st_size, stat.st_mtime)


def delete_folder(uri: str) -> None:
    """Remove a folder with all below it; one that does not exist is no error."""
    with failures(uri, "delete"):
        if is_remote(uri):
            for name in s3.call(uri, "find", s3.key(uri)):
                s3.call(uri, "rm_file", name)
        elif local_path(uri).is_dir():
            shutil.rmtree(local_path(uri))


def upload_tree(path: Path, uri: str) -> None:
    """Copy all files below a local folder, one after another in the order of their names."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        upload(file, join(uri, file.relative_to(path).as_posix()))
