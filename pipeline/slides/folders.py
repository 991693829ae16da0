"""Slides of several DICOM files: which files of a folder are one slide, and which folders are one.

The files of one series are one slide, whatever else lies beside them, and whatever the names of those that it is not
opened by. A folder is a slide where it holds the images of one series alone. OpenSlide takes what it finds for all
there is: it makes a smaller level the first one where full resolution is missing, so that is told from the files' own
words.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from pipeline.errors import SlideError
from pipeline.formats.dicom import PREAMBLE, Head, read_head
from pipeline.storage import files
from pipeline.storage.files import SourceVersion

SUFFIX = ".dcm"
"""Of the files that a folder is looked through for, and of the one that a slide is opened by."""
THREADS = 16  # they wait on the storage


@dataclass(frozen=True)
class Series:
    """Of one slide, in a folder."""

    uid: str
    names: tuple[str, ...]
    """Of its files, sorted."""


def is_folder(uri: str) -> bool:
    """Whether a URI means a folder; that of one in a cloud ends with `/`."""
    return uri.endswith("/") if files.is_remote(uri) else files.local_path(uri).is_dir()


def place_of(uri: str) -> str:
    """As `files.absolute`, and a folder in a cloud still ends with `/`."""
    place = files.absolute(uri)
    return files.join(place, "") if files.is_remote(place) and uri.endswith("/") else place


def main_file(uri: str) -> str:
    """The file that a slide is opened by: of a folder the first of its series, else `uri` itself.

    Raises:
        SlideError: "directory", the folder holds no DICOM slide; "series", it holds several.
        StorageError: the folder or a file in it cannot be read.
    """
    if not is_folder(uri):
        return uri
    found = slides_in(uri, [name for name in files.list_versions(uri) if name.lower().endswith(SUFFIX)])
    if not found:
        raise SlideError(
            "directory",
            f"{uri}: a directory that holds no DICOM slide (files that end in {SUFFIX}); name the slide's main file",
        )
    if len(found) > 1:
        told = ", ".join(f"{one.names[0]} is of series {one.uid} ({len(one.names)} files)" for one in found[:4])
        raise SlideError(
            "series",
            f"{uri}: the folder holds the DICOM files of {len(found)} slides: {told}"
            f"{', ...' if len(found) > 4 else ''}; name a file of the one that is meant, or give each a folder",
        )
    return files.join(uri, found[0].names[0])


def slides_in(folder: str, names: Iterable[str]) -> list[Series]:
    """The slides that files of a folder are of, by their first names; what is no image of a slide is left out.

    Raises:
        StorageError: a file cannot be read.
    """
    versions = files.list_versions(folder)
    wanted = sorted(name for name in names if name in versions and not files.is_temporary(name))
    heads = _heads(folder, {name: versions[name] for name in wanted})
    slides = {head.series for head in heads.values() if head is not None and head.is_slide}
    own = sorted((head.series, name) for name, head in heads.items() if head is not None and head.series in slides)
    series = [
        Series(uid.decode("ascii", "replace"), tuple(name for _, name in group))
        for uid, group in groupby(own, key=lambda one: one[0])
    ]
    return sorted(series, key=lambda one: one.names)


def of_series(uri: str, versions: Mapping[str, SourceVersion]) -> dict[str, SourceVersion]:
    """Those files of a folder that are of the main file's series; a folder may hold the slides of a whole study.

    Args:
        uri: of the main file.
        versions: of all files of its folder, by name.

    Raises:
        SlideError: "series", they are of several studies, or the image at full resolution is not among them.
        StorageError: a file cannot be read.
    """
    folder, _, name = uri.rpartition("/")
    main = _head(uri, files.source_version(uri))
    if main is None:
        return {}
    heads = {
        other: head
        for other, head in _heads(folder, versions).items()
        if head is not None and head.series == main.series
    }
    _check(uri, {**heads, name: main})
    return {other: versions[other] for other in heads}


def _check(uri: str, heads: Mapping[str, Head]) -> None:
    by_study = {head.study: name for name, head in sorted(heads.items(), reverse=True)}
    if len(by_study) > 1:
        one, other = sorted(by_study.values())[:2]
        raise SlideError(
            "series",
            f"{uri}: the files of its series name {len(by_study)} studies, as {one} and {other} do; take out what is "
            "not of this slide",
        )
    if any(head.is_reduced for head in heads.values()) and not any(head.is_full for head in heads.values()):
        raise SlideError(
            "series",
            f"{uri}: the image at full resolution is missing: each of its {len(heads)} files says that it is a smaller "
            "one (RESAMPLED); copy the whole series into one folder",
        )


def _heads(folder: str, versions: Mapping[str, SourceVersion]) -> dict[str, Head | None]:
    with _lock(folder), ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _head(files.join(folder, name), versions[name]), versions)
        return dict(zip(versions, found, strict=True))


@lru_cache(maxsize=1024)
def _lock(folder: str) -> threading.Lock:
    """One thread reads the heads of a folder's files, and the others find them in the cache."""
    del folder
    return threading.Lock()


@lru_cache(maxsize=16384)  # files: each head is read once a process and version, not once a slide; 1 KB each
def _head(uri: str, version: SourceVersion) -> Head | None:
    """Of a DICOM file, whatever its name; None when it is none."""

    def read(start: int, length: int) -> bytes:
        return files.read_ranges(uri, [(start, max(0, min(length, version.size - start)))])[0]

    return read_head(read) if version.size > PREAMBLE else None
