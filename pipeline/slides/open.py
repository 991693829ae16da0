"""A slide or plain image, opened by whichever reader fits: raw TIFF tiles, OpenSlide, or Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from pipeline.errors import NodeError, SlideError, StorageError
from pipeline.slides.image import ImageReader
from pipeline.slides.layout import read_layout
from pipeline.slides.openslide import LIBRARY_VERSION, OpenSlideReader, is_openslide
from pipeline.slides.reader import RGB, UNREAD, Level, NativeTiles, Overview, SlideReader
from pipeline.slides.tiff import TiffReader
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


def open_slide(path: Path) -> SlideReader:
    """Open a local slide or plain image.

    Raises:
        SlideError: reasons "missing", "directory", "empty-file", "truncated", "not-a-slide", "unopenable",
            "unreadable", "too-large" (a plain image over 268 MPx), "pixel-type" (not 8 bits a channel), "source" (the
            disk or this process fails for now).
    """
    if not path.exists():
        raise SlideError("missing", f"{path}: no such file; correct the cohort's uri")
    if path.is_dir():
        raise SlideError("directory", f"{path}: a directory, not a slide; name the slide's main file")
    if path.stat().st_size == 0:
        raise SlideError("empty-file", f"{path}: zero bytes; copy the slide again")
    return _tiff(LocalSource(path)) or (OpenSlideReader(path) if is_openslide(path) else ImageReader(path))


@contextmanager
def open_uri(
    uri: str, members: Callable[[], Sequence[str]], staging: Staging, fetched: Fetched | None = None
) -> Iterator[SlideReader]:
    """Open a slide wherever it lies; on S3 in place if it can be read by ranges, else as a copy on this node.

    Args:
        uri: of its main file.
        members: gives all its files; called only for a copy.
        staging: where copies are kept.
        fetched: its main file where it was read before: nothing of it travels again.

    Raises:
        SlideError: as `open_slide`; "source", it cannot be reached; "cache", it is too large for a copy.
        NodeError: the copy cannot be written.
    """
    with ExitStack() as stack:
        if not files.is_remote(uri):
            yield stack.enter_context(open_slide(Path(files.absolute(uri))))
            return
        in_place = _tiff(RemoteSource(uri) if fetched is None else FetchedSource(uri, fetched.data))
        if in_place is not None:
            yield stack.enter_context(in_place)
            return
        try:
            path = stack.enter_context(staging.hold(uri, members(), fetched))
        except NodeError:
            raise
        except StorageError as error:
            raise source_error(error) from error
        yield stack.enter_context(open_slide(path))


def _tiff(source: ByteSource) -> TiffReader | None:
    """The raw reader where the source is a slide for it; else the source is closed."""
    try:
        layout = read_layout(source)
    except SlideError:
        source.close()
        raise
    if layout is not None:
        return TiffReader(source, layout)
    source.close()
    return None


def tool_versions() -> dict[str, str]:
    """Versions of what decodes and encodes pixels, for the patch store's record."""
    names = ("imagecodecs", "numpy", "pillow", "simplejpeg", "tifffile")
    return {**{name: version(name) for name in names}, "openslide": LIBRARY_VERSION}
