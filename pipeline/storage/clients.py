"""Which client a URI needs, and its failures, and those of the file system, as StorageErrors."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.credentials import masked_value, refusal
from pipeline.errors import StorageError
from pipeline.storage.cloud import ChangedError, Cloud
from pipeline.storage.objects import Objects
from pipeline.storage.s3 import Amazon

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_CLOUDS: dict[str, Cloud] = {"s3": Amazon(), "gs": Objects(), "az": Objects()}


def is_remote(uri: str) -> bool:
    """Whether the URI lies in a cloud. One that holds a credential is a StorageError, whatever is to be done."""
    if (problem := refusal(uri)) is not None:
        raise StorageError(f"{masked_value(uri)}: {problem}")
    found = SCHEME.match(uri)
    if found is None or found[1].lower() == "file":
        return False
    if found[1].lower() not in _CLOUDS:
        raise StorageError(f"{uri}: {found[0]} is not supported; use a path, file://, s3://, gs:// or az://")
    return True


def cloud(uri: str) -> Cloud:
    """The client of a remote URI."""
    return _CLOUDS[uri.partition("://")[0].lower()]


class NoFileError(OSError):
    """A pipe, a device or a socket: it may have no end, or be opened for ever."""


@contextmanager
def failures(uri: str, action: str) -> Iterator[None]:
    """Turn what the file system or a cloud's client raises into a StorageError."""
    try:
        yield
    except (StorageError, ChangedError):
        raise
    except Exception as error:
        reason = cloud(uri).reason(error, uri) if is_remote(uri) else None
        if reason is None and isinstance(error, OSError):
            reason = _os_reason(error)
        if reason is None and isinstance(error, ValueError) and not uri.isprintable():  # a NUL, half a character
            raise StorageError(f"cannot {action} {uri!a}: no file can have such a name; correct it") from error
        if reason is None:
            raise
        raise StorageError(f"cannot {action} {uri}: {reason}") from error


def _os_reason(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "it does not exist; check the spelling"
        case IsADirectoryError():
            return "it is a folder; name a file"
        case NoFileError():
            return "it is a pipe, a device or a socket; name a file"
        case NotADirectoryError() | FileExistsError():
            return f"a folder of this path is a file ({error.filename}); name another path"
        case PermissionError():
            return "permission denied; check its owner and mode, and those of its folders"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk, or its quota, is full; free space, or name a place with more"
    return f"{error.strerror or error}; mend that and run again"
