"""Plain images (PNG, JPEG, TIFF) through Pillow; JPEGs as strictly as tiles, because Pillow fills damage with grey."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SlideError
from pipeline.slides.reader import RGB, Level, SlideReader, on_background, profile_name
from pipeline.slides.turned import orientation, upright
from pipeline.storage.ranges import system_error

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF")
PLAIN = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""What a PNG and a JPEG begin with: neither a TIFF nor a slide of OpenSlide's does."""
MAX_IMAGE_PX = 2**28  # a plain image is decoded whole: 268 MPx are 805 MB of RGB, and 1.9 GB through Pillow's 4 bytes
BAND_PX = 2**22  # converted at a time

Image.MAX_IMAGE_PIXELS = None  # the limit is MAX_IMAGE_PX, checked before anything is decoded


@dataclass(frozen=True)
class _File:
    """An image's file, on the disk or, where its bytes were read before, in memory."""

    path: Path
    data: bytes | None

    @property
    def name(self) -> str:
        return self.path.name

    def opened(self, formats: tuple[str, ...]) -> Image.Image:
        """Its first image, not yet decoded."""
        return Image.open(self.path if self.data is None else io.BytesIO(self.data), formats=formats)

    def content(self, length: int | None = None) -> bytes:
        """Its first `length` bytes, or all."""
        if self.data is not None:
            return self.data[:length]
        with self.path.open("rb") as file:
            return file.read(length)


class ImageReader(SlideReader):
    """A plain image, decoded whole: one level, no mpp.

    The resolution that such files state is not taken: programs write 72 px per inch into whatever they save.
    """

    def __init__(self, path: Path, frame: int = 0, data: bytes | None = None) -> None:
        """Decode the image; of a file of several the one of this number. `data`: its bytes, if they are at hand."""
        self.mpp, file = None, _File(path, data)
        try:
            with warnings.catch_warnings(action="ignore"), file.opened(IMAGE_FORMATS) as image:
                image.seek(frame)
                _check_image(file, image)
                self.vendor = str(image.format).lower()
                self.profile = profile_name(image.info.get("icc_profile"))
                turn = _png_orientation(file) if image.format == "PNG" else orientation(image)
                data = _jpeg_data(file, image)
                pixels = _image_rgb(file, image) if data is None else simplejpeg.decode_jpeg(data)
                self._pixels = upright(pixels, turn)
        except UnidentifiedImageError as error:
            raise SlideError(
                "not-a-slide",
                f"{file.name}: neither a slide format that OpenSlide reads nor {', '.join(IMAGE_FORMATS)}",
            ) from error
        except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # Pillow: of broken PNGs and TIFFs; libpng
            raise system_error(file.name, error) or SlideError(
                "unreadable", f"{file.name}: the image cannot be decoded: {error}; copy it again"
            ) from error
        height, width = self._pixels.shape[:2]
        self.levels = (Level(width, height, 1.0),)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> RGB:
        """See `SlideReader.read`; the box is always decodable."""
        return np.ascontiguousarray(self._pixels[y : y + h, x : x + w])

    def close(self) -> None:
        """Free the pixels."""
        del self._pixels


def _check_image(file: _File, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PX:
        raise SlideError(
            "too-large",
            f"{file.name}: a plain image of {width} x {height} px is over {MAX_IMAGE_PX} px; convert it to a "
            "tiled pyramid, e.g. `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`",
        )
    if image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"}:
        raise SlideError(
            "pixel-type", f"{file.name}: pixels of type {image.mode}; convert the image to RGB of 8 bits a channel"
        )
    if image.format == "PNG" and (bits := _png_bits(file)) > 8:  # Pillow keeps the upper 8 and does not say so
        raise SlideError("pixel-type", f"{file.name}: {bits} bits a channel; convert the image to 8")


def _png_orientation(file: _File) -> int:
    """Of the file opened for that alone: Pillow decodes the whole PNG for it, 4 bytes a px that are freed here."""
    with file.opened(("PNG",)) as image:
        return orientation(image)


def _png_bits(file: _File) -> int:
    """Of a channel, as the header chunk says, which is a PNG's first: signature, length, IHDR, width, height, bits."""
    return file.content(25)[24]


def _jpeg_data(file: _File, image: Image.Image) -> bytes | None:
    """A JPEG in grey or three colours, whose pixels simplejpeg gives as Pillow does; None for others."""
    if image.format not in {"JPEG", "MPO"} or image.mode not in {"L", "RGB"}:
        return None
    data = file.content()
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a subsampling that it does not know: Pillow says whether it is sound
        return None
    return data


def _image_rgb(file: _File, image: Image.Image) -> RGB:
    if image.format == "PNG" and image.mode == "RGB" and not image.has_transparency_data:
        import imagecodecs  # 0.1 s, which other slides need not pay

        pixels: RGB = imagecodecs.png_decode(file.content())  # Pillow's pixels, without its own copy of them
        return pixels
    out, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, BAND_PX // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        out[top : top + rows] = _band_rgb(band, transparent=image.has_transparency_data)
    return out


def _band_rgb(band: Image.Image, *, transparent: bool) -> RGB:
    if transparent:
        return on_background(np.asarray(band.convert("RGBA")), np.full(3, 255, np.uint8))
    return np.asarray(band.convert("RGB"))
