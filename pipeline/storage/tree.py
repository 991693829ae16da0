"""All that lies below a folder, here or in a cloud: what is there, away with it, copied to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage.cloud import Found as Found
from pipeline.storage.files import cloud, delete, failures, is_remote, join, local_path, upload


def walk(uri: str) -> Iterator[Found]:
    """Every file below a folder, unfinished ones included, in the order of their URIs; none where there is no folder.

    In a cloud one request for 1,000 files.
    """
    with failures(uri, "list"):
        if is_remote(uri):
            yield from sorted(cloud(uri).walk(uri), key=lambda file: file.uri)
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
            for file in cloud(uri).walk(uri):
                delete(file.uri)
        elif local_path(uri).is_dir():
            shutil.rmtree(local_path(uri))


def upload_tree(path: Path, uri: str) -> None:
    """Copy all files below a local folder, one after another in the order of their names."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        upload(file, join(uri, file.relative_to(path).as_posix()))
