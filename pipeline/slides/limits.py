"""What a file may declare, checked before any library sets memory aside for it.

Libraries believe a TIFF's directory: of a tile of 200,000 x 200,000 px OpenSlide asks for 160 GB at once, and aborts
where it does not get them. What a file takes although it declares nothing odd is for `tiling.max_seconds` and
`tiling.max_slide_gib`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tifffile

from pipeline.errors import SlideError

MAX_TILE_PX = 2**26  # of 8192 x 8192 px, 16 times what scanners write: 268 MB as OpenSlide holds it
MAX_PAGES = 2**14  # directories; a stack of 100 planes has 700
MAX_REUSE = 16  # times that a file may be read over: blank tiles may share their bytes, which are few then
REUSED_BYTES = 2**28  # read in seconds, so that nobody need care whose they are
MAX_SLIDE_PX = 2**38  # 524,288 px square: 13 cm of 0.25 um
_WIDTH, _HEIGHT = 256, 257


def check_pages(name: str, tiff: tifffile.TiffFile) -> None:
    """Look at all directories, and those directly below them.

    Raises:
        SlideError: "too-large", one declares more than any slide has; "unreadable", they lead round in a circle, or
            one has a picture of no px.
    """
    if len(tiff.pages) > MAX_PAGES:
        raise SlideError("too-large", f"{name}: {len(tiff.pages)} directories are over {MAX_PAGES}; copy it again")
    places = {page.offset for page in tiff.pages}
    if _follows(tiff) in places or any(place in places for page in tiff.pages for place in page.subifds or ()):
        raise SlideError("unreadable", f"{name}: its directories lead round in a circle; copy the slide again")
    for top in tiff.pages:
        for page in (top, *(top.pages or ())):
            if 0 in (page.tags.valueof(_WIDTH, 1), page.tags.valueof(_HEIGHT, 1)):  # of no px tifffile makes a tile
                raise SlideError("unreadable", f"{name}: a picture of no px; copy the slide again")
            _check(name, "a picture", operator.index(page.imagewidth), operator.index(page.imagelength), MAX_SLIDE_PX)
            if page.is_tiled:
                _check(name, "a tile", operator.index(page.tilewidth), operator.index(page.tilelength), MAX_TILE_PX)


def _follows(tiff: tifffile.TiffFile) -> int:
    """Where the directory should be that follows the last one; 0 where there is none."""
    tiff.filehandle.seek(tiff.pages.next_page_offset)
    link = tiff.filehandle.read(tiff.tiff.offsetsize)
    return int.from_bytes(link, "little" if tiff.byteorder == "<" else "big")


def check_lengths(name: str, size: int, lengths: Sequence[npt.NDArray[np.uint64]]) -> None:
    """SlideError "too-large" where tiles share their bytes so often that a small file is a large slide.

    Args:
        name: of the file.
        size: its bytes.
        lengths: bytes of every tile, level by level.
    """
    total = sum(int(level[level <= size].sum(dtype=np.float64)) for level in lengths)  # others cost a tile each
    if total > max(REUSED_BYTES, MAX_REUSE * size):
        raise SlideError(
            "too-large", f"{name}: its tiles name {total} bytes and the file has {size}; copy the slide again"
        )


def _check(name: str, what: str, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise SlideError(
            "too-large",
            f"{name}: {what} of {width} x {height} px is over {limit} px; convert the slide to smaller tiles, e.g. "
            "`vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`",
        )
