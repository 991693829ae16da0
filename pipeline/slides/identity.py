"""What slide this is, by content: a digest that survives renaming and copying, and costs a few range reads.

A file under 64 MiB is hashed whole. Of a larger one: the size, the first and last MiB and, for a TIFF, all
tile offset and byte-count tables and 64 tiles a page, evenly spaced; of other large files 64 blocks of 64 KiB,
evenly spaced. What was changed between the samples the digest does not show: `tiler` looks again where a slide lost
patches. OpenSlide is not used: its quickhash misses changed level-0 pixels, and single-level TIFFs have none.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import tifffile

from pipeline.errors import NodeError, SlideError, StorageError
from pipeline.slides import folders
from pipeline.slides.layout import BROKEN
from pipeline.storage import files
from pipeline.storage.clients import NoFileError
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask
from pipeline.storage.ranges import Range, SourceFile
from pipeline.storage.staging import Fetched, fetch

COMPANIONS = frozenset({"mrxs", "vms", "dcm"})
"""Suffixes of formats whose slides are several files."""

WHOLE = 64 * 2**20  # bytes: below, the file is hashed whole
EDGE = 2**20  # bytes hashed at both ends
SAMPLES = 64  # tiles a page, or blocks of a file that is no TIFF
BLOCK = 64 * 2**10
VMS_BYTES = 2**20  # read of a VMS: some names, whoever gave its suffix to something else

_VMS_VALUE = re.compile(r"^\w+(?:\([\d,]+\))?[ \t]*=[ \t]*(.+?)\s*$", re.MULTILINE)  # a name may hold spaces

Segments = npt.NDArray[np.uint64]
"""(2, n) offsets and byte counts."""


@dataclass(frozen=True)
class Digest:
    """Of a slide's content, companion files of MRXS, VMS and DICOM included."""

    sha256: str
    whole: bool
    """Whether it is of every byte: slides that share it are the same. Of samples, they may differ in between."""


def slide_digest(uri: str, fetched: Fetched | None = None, *, whole: bool = False) -> Digest:
    """The slide's digest.

    Args:
        uri: of its main file, or of its folder.
        fetched: the slide's bytes where they are at hand (`fetch_small`).
        whole: read every byte, however large the slide is.

    Raises:
        StorageError: a file of the slide cannot be read.
        SlideError: as `folders.main_file`.
    """
    if fetched is not None:
        return Digest(_whole_digest(len(fetched.data), [fetched.data]), whole=True)
    sizes = {member: files.source_version(member).size for member in slide_files(uri)}
    members = sorted(_file_digest(member, size, whole=whole) for member, size in sizes.items())
    joined = members[0] if len(members) == 1 else hashlib.sha256("".join(members).encode()).hexdigest()
    return Digest(joined, whole or max(sizes.values()) < WHOLE)


def fetch_small(uri: str, size: int) -> Fetched | None:
    """All bytes of a remote slide whose digest needs all of them, so that they travel once; None of any other.

    Args:
        uri: of its main file.
        size: that it is known to have, bytes.

    Raises:
        StorageError: the slide cannot be read.
    """
    if not files.is_remote(uri) or folders.is_folder(uri) or is_several(uri) or size >= WHOLE:
        return None
    return fetch(uri)


def is_several(uri: str) -> bool:
    """Whether the slide is of a format whose slides are several files."""
    return _suffix(uri) in COMPANIONS


def slide_files(uri: str) -> list[str]:
    """The slide's main file and its companions: what has to lie together for the slide to open.

    `uri` may be that of its folder. Errors as of `slide_digest`.
    """
    uri = folders.main_file(uri)
    folder = _companion_folder(uri)
    return [uri, *sorted({files.join(folder, name) for name in _companion_versions(uri)} - {uri})]


def slide_version(uri: str, ask: Ask = files.source_version) -> SourceVersion:
    """Which state of its files a slide is in: that of its one file, or all its companions' in one.

    Args:
        uri: of its main file, or of its folder.
        ask: gives that file's version.

    Raises:
        StorageError: the main file is absent or denied.
        SlideError: as `folders.main_file`.
    """
    uri, main = _main_version(uri, ask)
    if not is_several(uri):
        return main
    versions = _companion_versions(uri)
    rows = [[name, *astuple(found)] for name, found in sorted(versions.items())]
    size = main.size + sum(found.size for found in versions.values())
    digest = hashlib.sha256(json.dumps([astuple(main), rows]).encode()).hexdigest()
    return SourceVersion(size, digest, None)


def _main_version(uri: str, ask: Ask) -> tuple[str, SourceVersion]:
    """The slide's main file, and its version; a file on a disk is looked at once."""
    if not files.is_remote(uri):
        try:
            return uri, ask(uri)
        except StorageError as error:
            if not isinstance(error.__cause__, IsADirectoryError):
                raise
    if folders.is_folder(uri):
        uri, ask = folders.main_file(uri), files.source_version
    return uri, ask(uri)


@contextmanager
def reading_source() -> Iterator[None]:
    """Tell a slide that cannot be reached (a SlideError) from a store that cannot (a StorageError)."""
    try:
        yield
    except NodeError:
        raise  # where the slide's copy was to go
    except StorageError as error:
        match error.__cause__:
            case FileNotFoundError() | ValueError():  # of a name that no file can have
                reason = "missing"
            case NoFileError():
                reason = "not-a-file"
            case IsADirectoryError():
                reason = "directory"
            case _:
                reason = "source"
        raise SlideError(reason, str(error)) from error


def _file_digest(uri: str, size: int, *, whole: bool) -> str:
    if whole or size < WHOLE:
        blocks = ([(start, min(WHOLE, size - start))] for start in range(0, size, WHOLE))
        return _whole_digest(size, (files.read_ranges(uri, block)[0] for block in blocks))
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    for data in files.read_ranges(uri, [(0, EDGE), (size - EDGE, EDGE)]):
        digest.update(data)
    try:
        pages = _tiff_tables(uri, size)
    except BROKEN:  # no TIFF, or a damaged one
        pages = []
    for segments in pages or [np.array([[0], [size]], np.uint64)]:
        digest.update(segments.tobytes())
        for data in files.read_ranges(uri, _samples(segments, size)):
            digest.update(data)
    return digest.hexdigest()


def _whole_digest(size: int, blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _tiff_tables(uri: str, size: int) -> list[Segments]:
    """The tiles or strips of every page, sub-IFDs included."""

    def read(wanted: Range) -> bytes:
        return files.read_ranges(uri, [wanted])[0]

    file = io.BufferedReader(SourceFile(size, read), buffer_size=BLOCK)
    with tifffile.TiffFile(file, name=PurePosixPath(uri).name) as tiff:  # the name tells NDPI's 64-bit offsets
        pages = [page for top in tiff.pages for page in (top, *(top.pages or ()))]
        return [np.array([page.dataoffsets, page.databytecounts], np.uint64) for page in pages]


def _samples(segments: Segments, size: int) -> list[Range]:
    """Up to 64 of the segments, evenly spaced; of a segment over 1 MiB (NDPI's strips) 64 blocks."""
    number = segments.shape[1]
    chosen = np.unique(np.linspace(0, number - 1, SAMPLES).astype(int)) if number else np.zeros(0, int)
    ranges: list[Range] = []
    for offset, count in segments[:, chosen].T.tolist():
        if count <= EDGE:
            ranges.append((offset, count))
        else:
            starts = np.linspace(offset, offset + count - BLOCK, SAMPLES).astype(np.int64).tolist()
            ranges.extend((start, BLOCK) for start in starts)
    return [(start, length) for start, length in ranges if length and 0 <= start <= size - length]  # sparse, cut off


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower()


def _companion_folder(uri: str) -> str:
    folder, _, name = uri.rpartition("/")
    return files.join(folder, name.rpartition(".")[0]) if _suffix(uri) == "mrxs" else folder


def _companion_versions(uri: str) -> dict[str, SourceVersion]:
    """The other files that belong to the slide whose main file is `uri`, by name; that one may be among them.

    A link to nothing among them is an error: without its file this would be another slide. So is a pipe.
    """
    suffix = _suffix(uri)
    if suffix not in COMPANIONS:
        return {}
    folder = _companion_folder(uri)
    versions, odd = files.list_versions(folder), files.without_file(folder)
    versions = {name: version for name, version in versions.items() if not files.is_temporary(name)}
    if suffix == "vms":
        named = _vms_names(uri)
        versions = {name: version for name, version in versions.items() if name in named}
        odd = [name for name in odd if name in named]
    if suffix == "dcm":  # whatever else lies in the folder of a study
        odd = [name for name in odd if name not in versions]
    for name in odd:
        versions[name] = files.source_version(files.join(folder, name))  # raises, and says so
    return folders.of_series(uri, versions) if suffix == "dcm" else versions


def _vms_names(uri: str) -> set[str]:
    (start,) = files.read_ranges(uri, [(0, min(files.source_version(uri).size, VMS_BYTES))])
    return set(_VMS_VALUE.findall(start.decode("utf-8", "surrogateescape")))
