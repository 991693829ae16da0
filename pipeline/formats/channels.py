"""Which samples and planes of a TIFF are red, green and blue: those that it says to be, and no others.

Grey in one plane is a picture; several channels that are no colours (fluorescence, spectral bands) are none, and no
channel stands for the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import tifffile

from pipeline.errors import SlideError
from pipeline.formats.ome import Channel

_COLOURS = ("red", "green", "blue")
_NAMES = {name: number for number, colour in enumerate(_COLOURS) for name in (colour, colour[0])}
_RGBA = {0xFF0000FF: 0, 0x00FF00FF: 1, 0x0000FFFF: 2}  # the Color of a Channel
_NUMBERED = re.compile(r"(channel|ch|c)?[\s:_#-]*[\d:]*", re.IGNORECASE)  # a name that says nothing
_GREY, _RGB, _CMYK = (0, 1), 2, 5
_SAMPLES = {0: (1,), 1: (1,), 2: (3,), 3: (1,), 4: (1,), 6: (3,), 8: (1, 3), 9: (3,), 10: (3,)}  # a px of a photometric
_TRANSPARENT = ((1,), (2,))  # ExtraSamples
_REMEDY = "convert the slide to RGB of 8 bits a channel"

Order = tuple[int, ...]
"""Number of the red, green and blue one."""


def colour_order(channels: Sequence[Channel]) -> Order | None:
    """Which of three channels is red, green and blue, by their names, or by their colours where names say nothing."""
    found = [_colour(channel) for channel in channels]
    alike = len(found) == len(_COLOURS) and set(found) == set(range(3))
    return tuple(found.index(colour) for colour in range(3)) if alike else None


def find_colours(name: str, level: Sequence[tifffile.TiffPage], channels: Sequence[Channel]) -> Order | None:
    """Number of the red, green and blue one of a level's directories, or of the samples of its only one.

    Args:
        name: of the slide.
        level: its directories, in the order of the channels.
        channels: what the OME-XML says of them; empty without one.

    Returns:
        None where the only directory says itself what its samples are.

    Raises:
        SlideError: "pixel-type", they are no colours, or not all of them are in the file.
    """
    first, order = level[0], colour_order(channels)
    if len(level) == 1 and (int(first.samplesperpixel) > 1 or len(channels) <= 1):
        return None if _is_picture(name, first) else _of_samples(name, first, order)
    if order is None:
        raise _no_colours(name, max(len(level), len(channels)), [channel.name for channel in channels])
    if len(level) != len(order):
        raise SlideError("pixel-type", f"{name}: not all of its three channels are in this file; {_REMEDY}")
    return order


def check_samples(name: str, page: tifffile.TiffPage) -> None:
    """Raise where a directory does not say that what it holds of a px is grey or a colour.

    Raises:
        SlideError: "pixel-type".
    """
    if not _is_picture(name, page):
        raise _no_colours(name, int(page.samplesperpixel), ())


def _is_picture(name: str, page: tifffile.TiffPage) -> bool:
    """Whether a directory says of its samples that they are grey or a colour, with or without transparency."""
    photometric, samples, more = int(page.photometric), int(page.samplesperpixel), tuple(page.extrasamples)
    if photometric == _CMYK:
        raise SlideError("pixel-type", f"{name}: CMYK, of which only a printer's profile makes colours; {_REMEDY}")
    colours = samples - 1 if more in _TRANSPARENT else samples
    if photometric == _RGB and colours > len(_COLOURS):
        what = "RGB and what it does not call transparency"
        raise SlideError("pixel-type", f"{name}: {samples} channels, {what}; {_REMEDY}")
    return colours in _SAMPLES.get(photometric, (colours,))


def _of_samples(name: str, page: tifffile.TiffPage, order: Order | None) -> Order:
    """The order of samples that the OME-XML calls red, green and blue."""
    if order is None or int(page.samplesperpixel) != len(order):
        raise _no_colours(name, int(page.samplesperpixel), ())
    return order


def check_alone(name: str, tiff: tifffile.TiffFile) -> None:
    """Raise where a file that is no OME-TIFF is grey in several planes: as many channels, and which they are is unsaid.

    Raises:
        SlideError: "pixel-type".
    """
    first = tiff.pages.first
    if int(first.photometric) not in _GREY or int(first.samplesperpixel) != 1:
        return
    size = (first.imagewidth, first.imagelength)
    alike = sum((page.imagewidth, page.imagelength) == size and int(page.photometric) in _GREY for page in tiff.pages)
    stated = int((tiff.imagej_metadata or {}).get("channels", 1)) if tiff.is_imagej else 1
    if max(alike, stated) > 1:
        raise _no_colours(name, max(alike, stated), ())


def _no_colours(name: str, count: int, names: Sequence[str]) -> SlideError:
    named = ", ".join(name for name in names if name)
    return SlideError(
        "pixel-type",
        f"{name}: {count} channels{f' ({named})' if named else ''}, which it does not call red, green and blue; "
        f"{_REMEDY}, or name them so in its OME-XML where that is what they are",
    )


def _colour(channel: Channel) -> int | None:
    if channel.samples != 1:
        return None
    name = channel.name.strip().lower()
    if _NUMBERED.fullmatch(name):
        return None if channel.colour is None else _RGBA.get(channel.colour)
    return _NAMES.get(name)
