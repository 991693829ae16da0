"""What a TIFF's OME-XML says: its images with sizes, microns, channels, and the directories that hold their planes.

Nothing is looked up in the file here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree

MICRON = "µm"  # the schema's unit of a length that names none
_MICRONS = {
    **dict.fromkeys(("\u03bcm", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    "pm": 1e-6,
    "\u00c5": 1e-4,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "thou": 25.4,
    **dict.fromkeys(("in", "inch"), 25_400.0),
}  # after NFKC, which makes the micro sign a Greek mu and the sign of the angstrom its letter


class Plane(NamedTuple):
    """Which plane of an image: focal plane, channel, time."""

    z: int
    c: int
    t: int


@dataclass(frozen=True)
class Length:
    """A physical size of a px."""

    value: float
    """Finite and positive."""
    unit: str
    """As the XML spells it."""

    @property
    def microns(self) -> float | None:
        """None where the unit is no length (pixel, reference frame)."""
        factor = _MICRONS.get(unicodedata.normalize("NFKC", self.unit).strip())
        return None if factor is None else self.value * factor


@dataclass(frozen=True)
class Channel:
    """One channel; an RGB image in one plane is one channel of 3 samples."""

    name: str
    samples: int
    colour: int | None = None
    """As RGBA, a byte each; None where the XML names none."""


@dataclass(frozen=True)
class TiffData:
    """Where some planes of an image lie: consecutive directories of a file."""

    ifd: int
    planes: int | None
    """None: all that the image has."""
    first: Mapping[str, int]
    """Of Z, C and T the index of the first plane."""
    uuid: str | None
    """Of the file; None: the one that holds the XML."""


@dataclass(frozen=True)
class OmeImage:
    """One `Image`."""

    name: str
    order: str
    """Dimensions, the fastest first: XYCZT."""
    sizes: Mapping[str, int]
    """Of X, Y, Z, C and T; C counts samples: 3 for RGB in one plane."""
    physical: tuple[Length | None, Length | None]
    """Of a px along x and y."""
    channels: tuple[Channel, ...]
    tiff_data: tuple[TiffData, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Planes along Z, C and T: channels that share a plane count once."""
        samples = max((channel.samples for channel in self.channels), default=1)
        counts = {"Z": self.sizes["Z"], "C": self.sizes["C"] // samples, "T": self.sizes["T"]}
        return {axis: max(1, count) for axis, count in counts.items()}

    def planes(self, uuid: str | None, directories: int) -> dict[int, Plane]:
        """Directory -> its plane, of those that lie in the file with this UUID; empty without TiffData.

        Args:
            uuid: of the file.
            directories: that the file has, whatever the XML counts.
        """
        counts, axes = self.counts, self.order[2:]
        total = math.prod(counts.values())
        found: dict[int, Plane] = {}
        for data in self.tiff_data:
            if data.uuid not in (None, uuid):
                continue
            number = _raveled(data.first, counts, axes)
            wanted = total if data.planes is None else data.planes
            for step in range(min(total - number, wanted, directories - data.ifd)):
                found.setdefault(data.ifd + step, _plane(number + step, counts, axes))
        return found

    def in_order(self) -> Iterator[Plane]:
        """All planes, as they follow one another."""
        counts = self.counts
        return (_plane(number, counts, self.order[2:]) for number in range(math.prod(counts.values())))

    def is_in(self, uuid: str | None) -> bool:
        """Whether the XML does not say that all planes lie in other files."""
        return not self.tiff_data or any(data.uuid in (None, uuid) for data in self.tiff_data)


@dataclass(frozen=True)
class Ome:
    """All images, in the order of the XML."""

    uuid: str | None
    """Of the file that holds the XML, as far as it tells."""
    images: tuple[OmeImage, ...]


def parse_ome(xml: str) -> Ome:
    """What the XML says.

    Raises:
        ElementTree.ParseError: it is no XML.
        ValueError: a size is no whole number, or the order of dimensions unknown.
    """
    root = ElementTree.fromstring(xml)
    images = [(image, image.find("{*}Pixels")) for image in root.iterfind("{*}Image")]
    parsed = tuple(_image(image, pixels) for image, pixels in images if pixels is not None)
    named = {data.uuid for image in parsed for data in image.tiff_data if data.uuid is not None}
    return Ome(named.pop() if len(named) == 1 else root.get("UUID"), parsed)  # the only file named is this one


def _image(image: ElementTree.Element, pixels: ElementTree.Element) -> OmeImage:
    order = pixels.get("DimensionOrder", "XYCZT")
    if sorted(order) != sorted("XYCZT") or order[:2] != "XY":
        raise ValueError(f"DimensionOrder {order}")
    return OmeImage(
        name=image.get("Name", ""),
        order=order,
        sizes={axis: _number(pixels, f"Size{axis}", 1) for axis in "XYZCT"},
        physical=(_length(pixels, "X"), _length(pixels, "Y")),
        channels=tuple(_channel(node) for node in pixels.iterfind("{*}Channel")),
        tiff_data=tuple(_tiff_data(node) for node in pixels.iterfind("{*}TiffData")),
    )


def _channel(node: ElementTree.Element) -> Channel:
    colour = node.get("Color", "")
    known = int(colour) & 0xFFFFFFFF if re.fullmatch(r"-?\d+", colour) else None  # a signed number there
    return Channel(node.get("Name", ""), max(1, _number(node, "SamplesPerPixel", 1)), known)


def _tiff_data(node: ElementTree.Element) -> TiffData:
    uuid = node.find("{*}UUID")
    alone = 1 if "IFD" in node.attrib else None
    count = node.get("PlaneCount", node.get("NumPlanes"))  # the latter until 2012
    return TiffData(
        ifd=_number(node, "IFD", 0),
        planes=alone if count is None else int(count),
        first={axis: _number(node, f"First{axis}", 0) for axis in "ZCT"},
        uuid=None if uuid is None or not uuid.text else uuid.text.strip(),
    )


def _number(node: ElementTree.Element, name: str, default: int) -> int:
    value = int(node.get(name, default))
    if value < 0:
        raise ValueError(f"{name} {value}")
    return value


def _length(pixels: ElementTree.Element, axis: str) -> Length | None:
    """A px's size; None where the XML has none that is a positive number."""
    try:
        value = float(pixels.get(f"PhysicalSize{axis}", 0))
    except ValueError:
        return None
    unit = pixels.get(f"PhysicalSize{axis}Unit", MICRON)
    return Length(value, unit) if value > 0 and math.isfinite(value) else None


def _raveled(at: Mapping[str, int], counts: Mapping[str, int], axes: str) -> int:
    """Number of a plane, counted along `axes`, the fastest first."""
    number, step = 0, 1
    for axis in axes:
        number += min(at[axis], counts[axis] - 1) * step
        step *= counts[axis]
    return number


def _plane(number: int, counts: Mapping[str, int], axes: str) -> Plane:
    at = {}
    for axis in axes:
        number, at[axis] = divmod(number, counts[axis])
    return Plane(at["Z"], at["C"], at["T"])
