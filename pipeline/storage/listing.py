"""The state of many files at once: on S3 by pages of listings instead of a request a file.

In other clouds they are asked for side by side.

A page says which objects there are from a name on, a thousand at most. The next one starts at the first name that is
wanted and not yet told of: one page for each thousand files where they lie together. Where they do not, as slides among
millions of DICOM files, pages tell of few: then some files are asked alone, side by side, and twice as many after the
next such page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import s3
from pipeline.storage.files import SourceVersion, failures, is_remote, list_names, source_version

THREADS = 16  # they wait on the storage
PAGE = 1000  # names, S3's limit
FEW = THREADS  # files that are asked alone in the time of a page
TOLD = 256  # absent files that are asked for one by one, which tells a folder from nothing

Ask = Callable[[str], SourceVersion]
"""A file's version; StorageError as of `files.source_version`."""
_Found = SourceVersion | StorageError | None


def ask_all(uris: Iterable[str]) -> Ask:
    """The versions of these files, asked for now; the function then knows them, and asks for any other file."""
    remote = list(dict.fromkeys(uri for uri in uris if is_remote(uri) and "/" in s3.key(uri)))
    paged = [uri for uri in remote if uri[:5].lower() == "s3://" and not s3.is_arn(uri)]
    others = [uri for uri in remote if uri[:5].lower() in ("gs://", "az://")]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(others, pool.map(_alone, others), strict=True))
    found |= _ask_s3(paged)

    def ask(uri: str) -> SourceVersion:
        version = found.get(uri)
        if isinstance(version, StorageError):
            raise version
        return source_version(uri) if version is None else version

    return ask


def folder_names(uri: str) -> frozenset[str]:
    """Names of the folders in one that begin with a hexadecimal digit; S3 is asked for all digits at a time."""
    if uri[:5].lower() != "s3://":
        return frozenset(list_names(uri))
    bucket, folder, _ = s3.client(uri).split_path(s3.key(uri))

    def names(digit: str) -> list[str]:
        prefix, found = f"{folder}/{digit}", list[str]()
        token: dict[str, str] = {}
        with failures(uri, "list"):
            while True:
                page = _page(uri, Bucket=bucket, Prefix=prefix, Delimiter="/", **token)
                found += [entry["Prefix"].rstrip("/").rpartition("/")[2] for entry in page.get("CommonPrefixes", ())]
                if not page.get("IsTruncated"):
                    return found
                token = {"ContinuationToken": page["NextContinuationToken"]}

    with ThreadPoolExecutor(THREADS) as pool:
        return frozenset(name for found in pool.map(names, "0123456789abcdef") for name in found)


def _ask_s3(uris: Sequence[str]) -> dict[str, SourceVersion | StorageError]:
    runs = []
    for _, members in groupby(sorted(uris, key=_place), key=lambda uri: _place(uri)[:2]):
        bucket = list(members)
        size = max(PAGE, -(-len(bucket) // THREADS))  # of few, one run: pages follow one another
        runs += [bucket[start : start + size] for start in range(0, len(bucket), size)]
    with ThreadPoolExecutor(THREADS) as pool:
        found: dict[str, _Found] = {uri: one for part in pool.map(_run, runs) for uri, one in part.items()}
        untold = [uri for uri in uris if uri not in found]
        found |= zip(untold, pool.map(_alone, untold), strict=True)
        absent = [uri for uri, one in found.items() if one is None]
        found |= zip(absent, pool.map(_alone if len(absent) <= TOLD else _missing, absent), strict=True)
    return {uri: one for uri, one in found.items() if one is not None}


def _place(uri: str) -> tuple[bool, str, str]:
    bucket, _, name = s3.key(uri).partition("/")
    return s3.is_anonymous(uri), bucket, name


def _run(uris: Sequence[str]) -> dict[str, _Found]:
    """The versions of objects of one bucket, in the order of their names; None of those that are not there.

    Those of which pages did not tell are left out.
    """
    try:
        return _listed(uris)
    except Exception as error:
        reason = s3.reason(error, uris[0])
        if reason is None:
            raise
        if s3.code(error) not in (None, "NoSuchBucket"):  # who may read need not be allowed to list; or one odd name
            return {}
        return {uri: StorageError(f"cannot read {uri}: {reason}") for uri in uris}


def _listed(uris: Sequence[str]) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    place = leap = 0
    while place < len(uris):
        first = place
        _, bucket, name = _place(uris[place])
        page = _page(uris[place], Bucket=bucket, StartAfter=_before(name), MaxKeys=PAGE)
        entries = {str(entry["Key"]): entry for entry in page.get("Contents", ())}
        last = max(entries, default="") if page.get("IsTruncated") else None
        if last is not None and list(entries) != sorted(entries):  # so what it leaves out may yet be there
            return found
        while place < len(uris) and (last is None or _place(uris[place])[2] <= last):
            found[uris[place]] = _version(entries.get(_place(uris[place])[2]))
            place += 1
        leap = max(FEW, 2 * leap) if place - first < FEW else 0
        place += leap
    return found


def _page(uri: str, **options: Any) -> Any:
    return s3.call(uri, "call_s3", "list_objects_v2", **options)


def _before(name: str) -> str:
    """A name shortly before this one, in the order of S3, which is that of code points."""
    last = name[-1]
    return name[:-1] + (chr(ord(last) - 1) + "~" if " " < last <= "~" else "")


def _version(entry: Any) -> SourceVersion | None:
    return None if entry is None else SourceVersion(int(entry["Size"]), str(entry["ETag"]).strip('"'), None)


def _alone(uri: str) -> SourceVersion | StorageError:
    try:
        return source_version(uri)
    except StorageError as error:
        return error


def _missing(uri: str) -> StorageError:
    error = StorageError(f"cannot read {uri}: it does not exist; check the spelling")
    error.__cause__ = FileNotFoundError(uri)
    return error
