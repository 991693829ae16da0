"""A slide or plain image, opened by whichever reader fits: raw TIFF tiles, OpenSlide, or Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pipeline.errors import NodeError, SlideError, StorageError
from pipeline.slides.folders import main_file
from pipeline.slides.identity import is_several, reading_source
from pipeline.slides.image import PLAIN, ImageReader
from pipeline.slides.layout import Elsewhere, Layout, read_layout
from pipeline.slides.limits import check_lengths
from pipeline.slides.openslide import LIBRARY_VERSION, OpenSlideReader, is_openslide
from pipeline.slides.reader import RGB, UNREAD, Level, NativeTiles, Overview, SlideReader
from pipeline.slides.tiff import TiffReader
from pipeline.slides.turned import upright_reader
from pipeline.storage import files
from pipeline.storage.ranges import ByteSource, FetchedSource, LocalSource, RemoteSource, source_error
from pipeline.storage.staging import Fetched, Staging

__all__ = [
    "RGB",
    "UNREAD",
    "Level",
    "NativeTiles",
    "Overview",
    "SlideReader",
    "open_slide",
    "open_uri",
    "tool_versions",
]


def open_slide(path: Path, series: int | None = None) -> SlideReader:
    """Open a local slide or plain image.

    Args:
        path: its main file.
        series: number of the file's image to take; None: the one that is the slide.

    Raises:
        SlideError: reasons "missing", "directory", "not-a-file", "empty-file", "truncated", "not-a-slide",
            "unopenable", "unreadable", "too-large" (a plain image or a strip over 268 MPx, a tile over 67),
            "pixel-type" (not 8 bits a channel, or channels that are no colours), "orientation" (it is stored turned and
            cannot be read upright), "series" (which of several images is the slide cannot be told, or the one that is
            named not be read, or a DICOM slide is not named .dcm), "source" (the disk or this process fails for now).
    """
    if not path.exists():
        raise SlideError("missing", f"{path}: no such file; correct the cohort's uri")
    if path.is_dir():
        raise SlideError("directory", f"{path}: a directory, not a slide; name the slide's main file")
    if not path.is_file():
        raise SlideError("not-a-file", f"{path}: a pipe, a device or a socket; name a file")
    if path.stat().st_size == 0:
        raise SlideError("empty-file", f"{path}: zero bytes; copy the slide again")
    source = LocalSource(path)
    plain = source.read([(0, len(PLAIN[0]))])[0].startswith(PLAIN) and not is_several(path.name)  # an MRXS is a JPEG
    if plain:
        source.close()
    found = None if plain else _tiff(source, series)
    if isinstance(found, SlideReader):
        return found
    if found is None:
        _check_series(path.name, series)
    return ImageReader(path) if plain else _through_library(path, found)


def _check_series(name: str, series: int | None) -> None:
    if series is not None:
        raise SlideError(
            "series",
            f"{name}: the cohort names series {series}, but of this format the library picks the slide; leave "
            "the column empty",
        )


def _through_library(path: Path, found: Elsewhere | None) -> SlideReader:
    """OpenSlide's or Pillow's reader; SlideError "series" where it takes another image than the one that was found."""
    if found is None:
        return OpenSlideReader(path) if is_openslide(path) else ImageReader(path)
    reader: SlideReader
    if found.tiled and is_openslide(path):
        reader = OpenSlideReader(path)
        same = reader.dimensions == found.size and found.leads
    else:
        reader = ImageReader(path, found.directory or 0)
        same = found.directory is not None
    if not same:
        reader.close()
        raise found.refusal()
    reader.picked = found.picked
    return reader


@contextmanager
def open_uri(
    uri: str,
    members: Callable[[], Sequence[str]],
    staging: Staging,
    fetched: Fetched | None = None,
    series: int | None = None,
) -> Iterator[SlideReader]:
    """Open a slide wherever it lies; on S3 in place if it can be read by ranges, else as a copy on this node.

    Args:
        uri: of its main file, or of its folder.
        members: gives all its files; called only for a copy.
        staging: where copies are kept.
        fetched: its main file where it was read before: nothing of it travels again.
        series: as for `open_slide`.

    Raises:
        SlideError: as `open_slide`; "source", it cannot be reached; "cache", it is too large for a copy.
        NodeError: the copy cannot be written.
    """
    with ExitStack() as stack:
        with reading_source():
            uri = main_file(uri)
        if not files.is_remote(uri):
            yield stack.enter_context(open_slide(Path(files.absolute(uri)), series))
            return
        if fetched is not None and fetched.data.startswith(PLAIN):
            name = uri.rpartition("/")[2]
            _check_series(name, series)
            yield stack.enter_context(ImageReader(Path(name), data=fetched.data))
            return
        in_place = _tiff(RemoteSource(uri) if fetched is None else FetchedSource(uri, fetched.data), series)
        if isinstance(in_place, SlideReader):
            yield stack.enter_context(in_place)
            return
        try:
            path = stack.enter_context(staging.hold(uri, members(), fetched))
        except NodeError:
            raise
        except StorageError as error:
            raise source_error(error) from error
        yield stack.enter_context(open_slide(path, series))


def _tiff(source: ByteSource, series: int | None) -> SlideReader | Elsewhere | None:
    """The raw reader where the source is a slide for it; else the source is closed."""
    try:
        layout = read_layout(source, series)
        if isinstance(layout, Layout):
            check_lengths(source.name, source.size, [page.lengths for page in layout.pages])
            return upright_reader(TiffReader(source, layout), layout.orientation)
    except SlideError:
        source.close()
        raise
    source.close()
    return layout


@cache
def tool_versions() -> dict[str, str]:
    """Versions of what decodes and encodes pixels, for the patch store's record."""
    names = ("imagecodecs", "numpy", "pillow", "simplejpeg", "tifffile")
    return {**{name: version(name) for name in names}, "openslide": LIBRARY_VERSION}
