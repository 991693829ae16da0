"""What slide this is, by content: a digest that survives renaming and copying, and costs a few range reads.

A file under 64 MiB is hashed whole. Of a larger one: the size, the first and last MiB and, for a TIFF, all
tile offset and byte-count tables and 64 tiles a page, evenly spaced; of other large files 64 blocks of 64 KiB,
evenly spaced. OpenSlide is not used: its quickhash misses changed level-0 pixels, and single-level TIFFs
have none.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import PurePosixPath

import numpy as np
import tifffile

from pipeline import storage
from pipeline.errors import SlideError, StorageError
from pipeline.storage import SourceVersion

COMPANIONS = frozenset({"mrxs", "vms", "dcm"})
"""Suffixes of formats whose slides are several files."""

WHOLE = 64 * 2**20  # bytes: below, the file is hashed whole
EDGE = 2**20  # bytes hashed at both ends
SAMPLES = 64  # tiles a page, or blocks of a file that is no TIFF
BLOCK = 64 * 2**10

_SERIES_UID = re.compile(rb"\x20\x00\x0e\x00UI(..)", re.DOTALL)  # DICOM (0020,000E), explicit little endian

Range = tuple[int, int]


def slide_digest(uri: str) -> str:
    """Digest (sha256, hex) of a slide's content, companion files of MRXS, VMS and DICOM included.

    Raises:
        StorageError: a file of the slide cannot be read.
    """
    members = sorted(_file_digest(member) for member in slide_files(uri))
    return members[0] if len(members) == 1 else hashlib.sha256("".join(members).encode()).hexdigest()


def slide_files(uri: str) -> list[str]:
    """The slide's main file and its companions: what has to lie together for the slide to open.

    Raises:
        StorageError: the main file, or a folder, cannot be read.
    """
    return [uri, *sorted(set(_companions(uri)) - {uri})]


def slide_version(uri: str) -> SourceVersion:
    """Which state of its files a slide is in: that of its one file, or all its companions' in one.

    Raises:
        StorageError: the main file is absent, denied or a folder.
    """
    main = storage.source_version(uri)
    if _suffix(uri) not in COMPANIONS:
        return main
    folder = _companion_folder(uri)
    versions = storage.list_versions(folder)
    if _suffix(uri) == "vms":  # else all of the folder: a stranger's change costs one more look at the slide
        versions = {name: found for name, found in versions.items() if name in _vms_names(uri)}
    rows = [[name, *astuple(found)] for name, found in sorted(versions.items())]
    size = main.size + sum(found.size for found in versions.values())
    digest = hashlib.sha256(json.dumps([astuple(main), rows]).encode()).hexdigest()
    return SourceVersion(size, digest, None)


@contextmanager
def reading_source() -> Iterator[None]:
    """Tell a slide that cannot be reached (a SlideError) from a store that cannot (a StorageError)."""
    try:
        yield
    except StorageError as error:
        match error.__cause__:
            case FileNotFoundError():
                reason = "missing"
            case IsADirectoryError():
                reason = "directory"
            case _:
                reason = "source"
        raise SlideError(reason, str(error)) from error


def _file_digest(uri: str) -> str:
    size = storage.source_version(uri).size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    if size < WHOLE:
        digest.update(storage.read_bytes(uri))
        return digest.hexdigest()
    for data in storage.read_ranges(uri, [(0, EDGE), (size - EDGE, EDGE)]):
        digest.update(data)
    try:
        pages = _tiff_tables(uri, size) or [([0], [size])]
    except (tifffile.TiffFileError, struct.error, ValueError, IndexError):  # no TIFF, or a broken one
        pages = [([0], [size])]
    for offsets, counts in pages:
        digest.update(np.array([offsets, counts], np.uint64).tobytes())
        for data in storage.read_ranges(uri, _samples(offsets, counts, size)):
            digest.update(data)
    return digest.hexdigest()


def _tiff_tables(uri: str, size: int) -> list[tuple[list[int], list[int]]]:
    """Offsets and byte counts of the tiles or strips of every page, sub-IFDs included."""
    file = io.BufferedReader(_RangeFile(uri, size), buffer_size=BLOCK)
    with tifffile.TiffFile(file, name=PurePosixPath(uri).name) as tiff:  # the name tells NDPI's 64-bit offsets
        pages = [page for top in tiff.pages for page in (top, *(top.pages or ()))]
        return [(list(page.dataoffsets), list(page.databytecounts)) for page in pages]


def _samples(offsets: Sequence[int], counts: Sequence[int], size: int) -> list[Range]:
    """Up to 64 of the segments, evenly spaced; of a segment over 1 MiB (NDPI's strips) 64 blocks."""
    chosen = np.unique(np.linspace(0, len(offsets) - 1, SAMPLES).astype(int)) if len(offsets) else ()
    ranges: list[Range] = []
    for i in chosen:
        offset, count = offsets[i], counts[i]
        if count <= EDGE:
            ranges.append((offset, count))
        else:
            starts = np.linspace(offset, offset + count - BLOCK, SAMPLES).astype(np.int64).tolist()
            ranges.extend((start, BLOCK) for start in starts)
    return [(start, length) for start, length in ranges if length and start + length <= size]  # sparse, cut off


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower()


def _companion_folder(uri: str) -> str:
    folder, _, name = uri.rpartition("/")
    return storage.join(folder, name.rpartition(".")[0]) if _suffix(uri) == "mrxs" else folder


def _companions(uri: str) -> Iterator[str]:
    """The other files that belong to the slide whose main file is `uri`."""
    suffix = _suffix(uri)
    if suffix not in COMPANIONS:
        return
    folder = _companion_folder(uri)
    names = storage.list_names(folder)
    if suffix == "vms":
        names = [name for name in names if name in _vms_names(uri)]
    elif suffix == "dcm":
        series = _dicom_series(uri)
        names = [name for name in names if _suffix(name) == "dcm"] if series else []
        names = [name for name in names if _dicom_series(storage.join(folder, name)) == series]
    yield from (storage.join(folder, name) for name in names)


def _vms_names(uri: str) -> set[str]:
    text = storage.read_bytes(uri).decode("latin-1")
    return set(re.findall(r"^\w+(?:\(\d+,\d+\))?=(\S+)\s*$", text, re.MULTILINE))


def _dicom_series(uri: str) -> bytes | None:
    """Series instance UID of a DICOM file: its files are one slide. None when it is no DICOM file."""
    size = storage.source_version(uri).size
    (head,) = storage.read_ranges(uri, [(0, min(size, EDGE))])
    found = _SERIES_UID.search(head) if head[128:132] == b"DICM" else None
    if found is None:
        return None
    length = int.from_bytes(found[1], "little")
    return head[found.end() : found.end() + length].rstrip(b"\0 ")


class _RangeFile(io.RawIOBase):
    """A read-only file over range reads of a URI."""

    def __init__(self, uri: str, size: int) -> None:
        self._uri, self._size, self._at = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            (buffer[:length],) = storage.read_ranges(self._uri, [(self._at, length)])
            self._at += length
        return length
