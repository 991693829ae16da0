"""Files by URI: plain paths, `file://`, `s3://`, `gs://` and `az://`. The only module that knows where bytes are kept.

Each cloud stands behind one seam (`cloud`): S3 goes through s3fs, Google and Azure through obstore (`objects`). Of S3
the endpoint, region and credentials come from the standard AWS variables alone (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_PROFILE`, `AWS_DEFAULT_REGION`). Checksums
beyond S3's own are used only `when_required`: servers other than AWS often refuse the uploads of newer SDKs, or answer
a range read with the whole object's checksum. Set `AWS_REQUEST_CHECKSUM_CALCULATION` or
`AWS_RESPONSE_CHECKSUM_VALIDATION` to `when_supported` to have them.

A write is whole or absent: a temporary name, fsync and rename locally; one PUT or multipart upload on S3.
Every failure is a `StorageError` that names the URI, the reason and the remedy. Waits are finite: 5 s to connect and
15 s without a byte, twice; a body that breaks off is asked for once more. A dead endpoint costs 10 s, one that
connects and is silent a minute. `AWS_MAX_ATTEMPTS` sets another patience than 2 (training: 24, about 4 minutes).
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from pipeline.errors import DamagedError, StorageError
from pipeline.storage import s3
from pipeline.storage.clients import SCHEME, NoFileError
from pipeline.storage.clients import cloud as cloud
from pipeline.storage.clients import failures as failures
from pipeline.storage.clients import is_remote as is_remote
from pipeline.storage.cloud import SourceVersion as SourceVersion
from pipeline.storage.s3 import PART_BYTES


def join(root: str, *parts: str) -> str:
    """The URI of `parts` below `root`."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(uri: str) -> str:
    """The URI of the folder that holds it."""
    return absolute(uri).rpartition("/")[0] or "/"


def absolute(uri: str) -> str:
    """A URI that means the same in every process: `s3://bucket/key` and its like as it is, else an absolute path."""
    if not is_remote(uri):
        return _local_name(uri)
    scheme = uri.partition("://")[0].lower()
    return f"{scheme}://{s3.ANONYMOUS if s3.is_anonymous(uri) else ''}{s3.key(uri)}"


def exists(uri: str) -> bool:
    """Whether a file or folder is there. A bucket that does not exist is a StorageError."""
    with failures(uri, "look up"):
        return cloud(uri).exists(uri) if is_remote(uri) else local_path(uri).exists()


def source_version(uri: str) -> SourceVersion:
    """The file's size with its etag or mtime; StorageError when it is absent, denied, a folder or no file at all."""
    with failures(uri, "read"):
        if is_remote(uri):
            version = cloud(uri).version(uri)
        else:
            found = os.stat(_local_name(uri))  # noqa: PTH116
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise NoFileError
            version = None if stat.S_ISDIR(found.st_mode) else _local_version(found)
        if version is None:
            raise IsADirectoryError
        return version


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with failures(uri, "read"):
        return _read(uri)


def read_if_there(uri: str) -> bytes | None:
    """The whole file; None when it does not exist. One request."""
    with failures(uri, "read"):
        try:
            return _read(uri)
        except FileNotFoundError as error:
            if is_remote(uri) and cloud(uri).is_missing_bucket(error):
                raise
            return None


def _read(uri: str) -> bytes:
    return cloud(uri).read(uri) if is_remote(uri) else local_path(uri).read_bytes()


def read_tagged(uri: str) -> tuple[bytes, str | None] | None:
    """The whole file, and by what `replace` knows it again, where the storage has such; None when it does not exist."""
    if not is_remote(uri):
        data = read_if_there(uri)
        return None if data is None else (data, None)
    with failures(uri, "read"):
        try:
            tag, data = cloud(uri).fetch(uri)
        except FileNotFoundError as error:
            if cloud(uri).is_missing_bucket(error):
                raise
            return None
        return data, tag


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (start, length), in that order; concurrent requests in a cloud."""
    with failures(uri, "read"):
        if is_remote(uri):
            fetched = iter(cloud(uri).read_ranges(uri, [wanted for wanted in ranges if wanted[1]]))
            found = [next(fetched) if length else b"" for _, length in ranges]
        else:
            with local_path(uri).open("rb") as file:
                found = [os.pread(file.fileno(), length, start) for start, length in ranges]
    for (start, length), data in zip(ranges, found, strict=True):
        if len(data) != length:
            raise DamagedError(
                f"cannot read {uri}: it ends at byte {start + len(data)}, {start + length} are needed; "
                "it is truncated or was changed: make it again"
            )
    return found


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file whole, over an old one."""
    with failures(uri, "write"):
        if is_remote(uri):
            cloud(uri).write(uri, data)
        else:
            _replace(local_path(uri), lambda file: file.write(data))


def replace(uri: str, data: bytes, tag: str | None) -> str | None:
    """Write the file only while it is still the one of this tag (`read_tagged`); None: while it is not there.

    Returns:
        Its new tag; None where the storage knows no conditions, so that it is written in any case: disks, some servers.

    Raises:
        ChangedError: another one wrote it since.
        StorageError: it cannot be written.
    """
    if not is_remote(uri):
        write_bytes(uri, data)
        return None
    with failures(uri, "write"):
        return cloud(uri).replace(uri, data, tag)


def read_json(uri: str) -> Any:
    """The parsed JSON file."""
    return parsed_json(uri, read_bytes(uri))


def parsed_json(uri: str, data: bytes) -> Any:
    """The JSON that was read from a file."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise DamagedError(f"cannot read {uri}: not JSON ({error}); delete it and run again") from error


def write_json(uri: str, obj: object) -> None:
    """Write sorted, indented JSON."""
    write_bytes(uri, json_bytes(obj))


def json_bytes(obj: object) -> bytes:
    """Sorted, indented JSON: equal objects give equal bytes."""
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")  # halves of characters, as JSON escapes


def list_names(uri: str) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; none when it does not exist, no broken links."""
    return sorted(name for name in _entries(uri) if not is_temporary(name))


def list_versions(uri: str) -> dict[str, SourceVersion]:
    """The state of each file directly in a folder, by name and unfinished ones included; of a cloud in one request."""
    found = _entries(uri)
    return {name: version for name, version in sorted(found.items()) if version is not None}


def _entries(uri: str) -> dict[str, SourceVersion | None]:
    """What is directly in a folder, by name; folders have no version."""
    with failures(uri, "list"):
        try:
            if is_remote(uri):
                return cloud(uri).entries(uri)
            with os.scandir(local_path(uri)) as scan:
                there = list(scan)
        except FileNotFoundError as error:
            if is_remote(uri) and cloud(uri).is_missing_bucket(error):
                raise
            return {}
        found: dict[str, SourceVersion | None] = {}
        for entry in there:
            with suppress(FileNotFoundError):  # that one is gone since, or a link to nothing; the others are there
                found[entry.name] = None if entry.is_dir() else _local_version(entry.stat())
        return found


def without_file(uri: str) -> list[str]:
    """Names directly in a folder that lead to no file or folder, sorted: links to nothing, pipes; a cloud has none."""
    if is_remote(uri) or not local_path(uri).is_dir():
        return []
    with failures(uri, "list"):
        return sorted(path.name for path in local_path(uri).iterdir() if not path.is_file() and not path.is_dir())


def _local_version(found: os.stat_result) -> SourceVersion:
    return SourceVersion(found.st_size, None, found.st_mtime)


def delete(uri: str) -> None:
    """Remove a file; one that does not exist is no error."""
    with failures(uri, "delete"):
        try:
            if is_remote(uri):
                cloud(uri).delete(uri)
            else:
                local_path(uri).unlink()
        except FileNotFoundError:
            return


def download(uri: str, path: Path) -> None:
    """Copy a file to a local path, whole or not at all."""
    with failures(uri, "read"):
        if not is_remote(uri):
            with local_path(uri).open("rb") as source:
                _replace(path, lambda file: shutil.copyfileobj(source, file, PART_BYTES))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            cloud(uri).download(uri, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def upload(path: Path, uri: str) -> None:
    """Copy a local file to a URI, whole or not at all, in constant memory."""
    with failures(uri, "write"):
        if is_remote(uri):
            cloud(uri).upload(path, uri)
        else:
            with path.open("rb") as source:
                _replace(local_path(uri), lambda file: shutil.copyfileobj(source, file, PART_BYTES))


def local_path(uri: str) -> Path:
    """The absolute path of a local URI."""
    return Path(_local_name(uri))


def _local_name(uri: str) -> str:
    """That path; of a million files a `Path` each would take longer than looking at them."""
    if SCHEME.match(uri):
        split = urlsplit(uri.replace("?", "%3F").replace("#", "%23"))
        if split.netloc not in ("", "localhost"):
            raise StorageError(f"{uri}: file:// names the host {split.netloc}; write file:///absolute/path")
        return str(Path(unquote(split.path)))
    # resolve() would follow links, which may lead elsewhere on another machine
    return os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was when its writer was killed."""
    return name.startswith(".") and name.endswith(".tmp")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


def _replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, flush it to the disk, then rename it; also flush the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
