"""Files that are written once: of several who would write one at the same moment, one does, and all know which.

A local file is linked to its name, which fails where there is one; clouds are asked to write on condition (`replace`).
A disk without links, or a server that does not know the condition, writes over what is there; so whoever wrote looks at
what others will read, and has written only where that is his own.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from contextlib import suppress

from pipeline.storage.cloud import ChangedError
from pipeline.storage.files import failures, is_remote, local_path, read_bytes, read_if_there, replace, write_bytes

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def create_json(uri: str, obj: object) -> bool:
    """Write a file of JSON that is not there yet; whether it holds just this now.

    Raises:
        StorageError: it can neither be written nor read.
    """
    return create_bytes(uri, (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def create_bytes(uri: str, data: bytes) -> bool:
    """As `create_json`, of bytes: also where someone else has written the same, or an attempt whose answer was lost."""
    before = read_if_there(uri)
    if before is not None:
        return before == data
    with failures(uri, "write"), suppress(FileExistsError, ChangedError):
        _create(uri, data)
    return read_bytes(uri) == data


def _create(uri: str, data: bytes) -> None:
    """Write it where nothing is; FileExistsError or ChangedError where something is."""
    if is_remote(uri):
        replace(uri, data, None)
        return
    path = local_path(uri)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    write_bytes(str(temporary), data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        write_bytes(uri, data)
    finally:
        temporary.unlink()
