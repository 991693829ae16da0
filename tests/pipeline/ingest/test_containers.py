"""One picture in every container: each stored patch shows the place that it names, in its colours, or the slide is
refused with a reason, whatever mask or tissue setting is given."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageCms

from pipeline.config.data import TilingConfig
from pipeline.ingest.tiler import store_slide
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from tests.pipeline.tiled import PATCH, RGB, SPEC, row
from tests.synth import overwrite, tile_span, write_pyramid, write_tiles

Picture = npt.NDArray[np.uint8]

MPP = 0.5
PER_CM: dict[str, Any] = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER", "metadata": None}
TILES: dict[str, Any] = {"tile": (PATCH, PATCH), "photometric": "rgb"}
PHYSICAL = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
PLANES = np.ascontiguousarray(RGB.transpose(2, 0, 1))
GREYS: dict[str, Any] = {"tile": (PATCH, PATCH), "photometric": "minisblack", "compression": "zlib"}
LOSSLESS = ["none", "lzw", "zlib", "packbits", "lzma", "zstd", "lerc", "png", "webp", "jpegxl", "jpegxr", "jpeg2000"]


def stored(path: Path, spec: TilingConfig = SPEC, mpp: float | None = None) -> tuple[SlideStatus, StoredSlide | None]:
    root = str(path.parent / "store")
    status = store_slide(row(path, mpp), spec, root)
    key = status.key
    return status, None if key is None else PatchStore(root, spec.fingerprint()).slide(key)


def check_patches(path: Path, spec: TilingConfig = SPEC, picture: Picture = RGB, mpp: float | None = None) -> None:
    """Every patch is the picture at its place: its texture, of 14 grey levels, would miss it elsewhere."""
    status, slide = stored(path, spec, mpp)
    assert slide is not None, status.reason
    assert (slide.mpp, slide.n_bad_tiles) == (MPP, 0)
    assert slide.n_patches > 18
    check_colours(slide, picture)


def check_colours(slide: StoredSlide, picture: Picture = RGB) -> None:
    index = slide.index()
    for number, data in enumerate(slide.payloads(range(slide.n_patches))):
        x, y = int(index.x[number]), int(index.y[number])
        expected = picture[y : y + PATCH, x : x + PATCH].astype(int)
        found = simplejpeg.decode_jpeg(data).astype(int)[: expected.shape[0], : expected.shape[1]]
        assert np.abs(found - expected).mean() < 5, (x, y)
        assert np.abs(found.mean((0, 1)) - expected.mean((0, 1))).max() < 1.5, (x, y)


def refusal(path: Path, spec: TilingConfig = SPEC) -> str:
    status, slide = stored(path, spec)
    assert slide is None
    assert status.reason is not None
    return status.reason


@pytest.mark.parametrize(
    ("codec", "predictor"),
    [
        *((codec, False) for codec in LOSSLESS),
        *((codec, True) for codec in LOSSLESS if codec in ("lzw", "zlib", "lzma", "zstd", "packbits")),
    ],
)
def test_tiles_of_every_codec(tmp_path: Path, codec: str, *, predictor: bool) -> None:
    levels: dict[str, dict[str, Any]] = {
        "webp": {"level": -1},
        "jpegxl": {"lossless": True},
        "jpegxr": {"level": 1.0},
    }
    args = levels.get(codec)
    options: dict[str, Any] = {"predictor": predictor, "compressionargs": args}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(RGB, compression=codec, **TILES, **PER_CM, **options)
        tiff.write(RGB[::2, ::2].copy(), compression=codec, subfiletype=1, metadata=None, **TILES, **options)
    check_patches(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("codec", "damage"),
    [
        *((codec, "zeros") for codec in LOSSLESS if codec != "none"),
        *((codec, "half") for codec in LOSSLESS if codec not in ("none", "jpegxr")),
    ],
)
def test_a_damaged_tile_of_any_codec_costs_itself(tmp_path: Path, codec: str, damage: str) -> None:
    """Uncompressed px show no damage, nor do the last 5 kB of a JPEG XR that were read as zeros."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, compression=codec, **TILES, **PER_CM)
    offset, length = tile_span(path, 0, 33)  # of row 3, column 3: tissue
    start = 0 if damage == "zeros" else length // 2
    overwrite(path, offset + start, bytes(length - start))
    _, slide = stored(path)
    assert slide is not None
    assert slide.n_bad_tiles == 1
    check_colours(slide)


def as_jfif(tile: Picture) -> bytes:
    return bytes(simplejpeg.encode_jpeg(tile, quality=97, colorspace="RGB", colorsubsampling="444"))


def as_components_rgb(tile: Picture) -> bytes:
    options: dict[str, Any] = {"colorspace": "rgb", "outcolorspace": "rgb", "subsampling": "444"}
    return bytes(imagecodecs.jpeg8_encode(tile, level=97, **options))


def as_adobe(transform: int, encode: Callable[[Picture], bytes]) -> Callable[[Picture], bytes]:
    """Components named 1, 2, 3, and Adobe's segment instead of JFIF's."""

    def adobe(tile: Picture) -> bytes:
        data = encode(tile)
        start = 4 + int.from_bytes(data[4:6], "big") if data[2:4] in (b"\xff\xe0", b"\xff\xee") else 2
        segment = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
        kept = data[start:].replace(b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0", 1)
        return b"\xff\xd8" + segment + kept.replace(b"\xff\xda\0\x0c\3R\0G\0B\0", b"\xff\xda\0\x0c\3\1\0\2\0\3\0", 1)

    return adobe


@pytest.mark.parametrize("codec", ["checked", "original", "encoded"])
@pytest.mark.parametrize("photometric", [2, 6])
@pytest.mark.parametrize(
    "encode",
    [as_jfif, as_components_rgb, as_adobe(1, as_jfif), as_adobe(0, as_components_rgb)],
    ids=["JFIF", "components R, G, B", "Adobe YCbCr", "Adobe RGB"],
)
def test_what_jpegs_say_of_their_colours_holds_whatever_the_directory_says(
    tmp_path: Path, encode: Callable[[Picture], bytes], photometric: int, codec: Any
) -> None:
    """And of patches that are the file's own bytes."""
    path = write_tiles(tmp_path / "a.tif", RGB, PATCH, encode, compression=7, photometric=photometric, mpp=MPP)
    check_patches(path, SPEC.model_copy(update={"codec": codec}))


def named(names: Sequence[str] | None = None, colours: Sequence[int] | None = None) -> dict[str, Any]:
    channel = {key: list(value) for key, value in (("Name", names), ("Color", colours)) if value}
    return {"axes": "CYX", **PHYSICAL, **({"Channel": channel} if channel else {})}


RED, GREEN, BLUE = -16776961, 16711935, 65535  # as signed RGBA
ORDERS = {
    "names": ((0, 1, 2), named(["Red", "Green", "Blue"])),
    "letters": ((2, 1, 0), named(["B", "G", "R"])),
    "names in another order": ((1, 2, 0), named(["green", "BLUE ", "red"])),
    "colours": ((2, 0, 1), named(None, [BLUE, RED, GREEN])),
    "colours of numbered channels": ((0, 2, 1), named(["Channel 0", "ch:1", "2"], [RED, BLUE, GREEN])),
}


@pytest.mark.parametrize("compression", ["zlib", "jpeg", "jpeg2000"])
@pytest.mark.parametrize("case", ORDERS)
def test_three_planes_that_the_xml_calls_colours(tmp_path: Path, case: str, compression: str) -> None:
    """Each in a directory with levels of its own."""
    order, metadata = ORDERS[case]
    greys = {**GREYS, "compression": compression}
    planes = np.ascontiguousarray(PLANES[list(order)])
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(planes, subifds=1, metadata=metadata, **greys)
        tiff.write(np.ascontiguousarray(planes[:, ::2, ::2]), subfiletype=1, **greys)
    check_patches(tmp_path / "a.ome.tif")


@pytest.mark.parametrize("compression", ["none", "lzw", "jpeg"])  # WebP has no single planes
@pytest.mark.parametrize("ome", [False, True])
def test_separate_planes_of_one_directory(tmp_path: Path, compression: str, *, ome: bool) -> None:
    """Planar configuration 2: no grid of tiles but three."""
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    options = {**PER_CM, "metadata": {"axes": "SYX", **PHYSICAL}} if ome else PER_CM
    quality = {"compressionargs": {"level": 97}} if compression == "jpeg" else {}
    tifffile.imwrite(path, PLANES, planarconfig="separate", compression=compression, **TILES, **options, **quality)
    check_patches(path)


@pytest.mark.parametrize("tissue", ["otsu", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["2", "3", "4", "5", "4 in one directory", "3 in strips", "ImageJ", "generic", "dyes"])
def test_channels_that_are_no_colours_are_no_slide(tmp_path: Path, case: str, tissue: Any, *, masked: bool) -> None:
    path = tmp_path / "a.ome.tif"
    count = int(case[0]) if case[0].isdigit() else 3
    planes = np.stack([PLANES[number % 3] for number in range(count)])
    match case:
        case "4 in one directory":
            options: dict[str, Any] = {"planarconfig": "contig", "metadata": {"axes": "YXS", **PHYSICAL}}
            tifffile.imwrite(path, np.ascontiguousarray(planes.transpose(1, 2, 0)), **GREYS, **options)
        case "3 in strips":
            tifffile.imwrite(path, planes, photometric="minisblack", metadata=named())
        case "ImageJ":
            path = tmp_path / "a.tif"
            tifffile.imwrite(path, planes[None, None], imagej=True, metadata={"axes": "TZCYX"})
        case "generic":
            path = tmp_path / "a.tif"
            tifffile.imwrite(path, planes, **GREYS, **PER_CM)
        case "dyes":
            dyes = named(["TRITC", "FITC", "DAPI"], [RED, GREEN, BLUE])
            tifffile.imwrite(path, planes, **GREYS, metadata=dyes)
        case _:
            tifffile.imwrite(path, planes, **GREYS, metadata=named())
    slide = row(path, MPP)
    if masked:
        Image.fromarray((PLANES[1] < 200).astype(np.uint8) * 255).save(tmp_path / "mask.png")
        slide = replace(slide, mask=str(tmp_path / "mask.png"))
    status = store_slide(slide, SPEC.model_copy(update={"tissue": tissue}), str(tmp_path / "store"))
    assert status.status == "quarantined"
    assert status.reason is not None
    assert status.reason.startswith(f"pixel-type: {path.name}: {count} channels")
    assert "convert the slide to RGB" in status.reason


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", ["zlib", "jpeg"])
def test_grey_in_one_plane_is_a_picture(tmp_path: Path, photometric: str, compression: str) -> None:
    grey = PLANES[1] if photometric == "minisblack" else 255 - PLANES[1]
    quality = {"compressionargs": {"level": 97}} if compression == "jpeg" else {}
    options: dict[str, Any] = {**GREYS, "photometric": photometric, "compression": compression, **quality}
    tifffile.imwrite(tmp_path / "a.tif", grey, **options, **PER_CM)
    check_patches(tmp_path / "a.tif", SPEC.model_copy(update={"tissue": "none"}), np.stack([PLANES[1]] * 3, -1))


@pytest.mark.parametrize("compression", ["zlib", "webp"])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, kind: str, compression: str) -> None:
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[:200] = 0
    alpha[200:250] = 128
    share = alpha[..., None] / 255
    seen = np.rint(RGB * share + 255 * (1 - share)).astype(np.uint8)
    colours = RGB if kind == "unassalpha" else np.rint(RGB * share).astype(np.uint8)
    lossless: dict[str, Any] = {"compressionargs": {"level": -1}} if compression == "webp" else {}
    options: dict[str, Any] = {"compression": compression, "extrasamples": [kind], **lossless}
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([colours, alpha]), **TILES, **PER_CM, **options)
    check_patches(tmp_path / "a.tif", SPEC.model_copy(update={"tissue": "none"}), seen)


TURNS: dict[int, Callable[[Picture], Picture]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),  # shown a quarter to the right it is upright
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("container", ["zlib tiles", "jpeg tiles", "ome", "strips", "png", "jpg"])
def test_a_slide_that_is_stored_turned_is_tiled_upright(tmp_path: Path, container: str, orientation: int) -> None:
    pixels = np.ascontiguousarray(TURNS[orientation](RGB))
    tag: dict[str, Any] = {"extratags": [(274, 3, 1, orientation, True)]}
    path, mpp = tmp_path / "a.tif", None
    match container:
        case "zlib tiles" | "jpeg tiles":
            quality: dict[str, Any] = {"compressionargs": {"level": 97}} if "jpeg" in container else {}
            tifffile.imwrite(path, pixels, compression=container[:4], **quality, **TILES, **PER_CM, **tag)
        case "ome":
            path = tmp_path / "a.ome.tif"
            tifffile.imwrite(path, pixels, compression="zlib", **TILES, metadata={"axes": "YXS", **PHYSICAL}, **tag)
        case "strips":
            tifffile.imwrite(path, pixels, photometric="rgb", **tag)
            mpp = MPP
        case _:
            path, mpp = tmp_path / f"a.{container}", MPP
            exif = Image.Exif()
            exif[274] = orientation
            quality = {"quality": 97, "subsampling": 0} if container == "jpg" else {}
            Image.fromarray(pixels).save(path, exif=exif, **quality)
    check_patches(path, mpp=mpp)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_slide_that_is_stored_turned_and_only_openslide_reads_is_refused(tmp_path: Path, orientation: int) -> None:
    """It would turn each tile in its place."""
    greys = np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)
    tag: dict[str, Any] = {"extratags": [(274, 3, 1, orientation, True)], "colormap": greys}
    options: dict[str, Any] = {"tile": (PATCH, PATCH), "photometric": "palette"}
    tifffile.imwrite(tmp_path / "a.tif", PLANES[1], **options, **PER_CM, **tag)
    assert refusal(tmp_path / "a.tif").startswith("orientation: a.tif: it is stored turned")


@pytest.mark.parametrize("case", ["generic", "generic lzw", "ome", "trestle", "10%"])
def test_px_that_are_not_square_are_refused(tmp_path: Path, case: str) -> None:
    """Of whichever reader. An mpp in the cohort says that they are square."""
    wide = np.repeat(RGB, 2, axis=1)
    path = tmp_path / "a.tif"
    per_cm = {**PER_CM, "resolution": (2e4 / MPP, 1e4 / MPP)}
    match case:
        case "generic" | "generic lzw":
            tifffile.imwrite(path, wide, compression="jpeg" if case == "generic" else "lzw", **TILES, **per_cm)
        case "ome":
            path = tmp_path / "a.ome.tif"
            metadata = {"axes": "YXS", "PhysicalSizeX": MPP / 2, "PhysicalSizeY": MPP * 1000, "PhysicalSizeYUnit": "nm"}
            tifffile.imwrite(path, wide, compression="lzw", **TILES, metadata=metadata)
        case "trestle":  # whose resolution tags are microns
            described = "Background Color=ffffff;Objective Power=20;OverlapsXY=0 0"
            write_pyramid(path, wide, levels=1, software="MedScan 1.1.7", description=described)
            with tifffile.TiffFile(path) as tiff:
                places = [tiff.pages.first.tags[code].valueoffset for code in (282, 283)]
            for at, mpp in zip(places, (25, 50), strict=True):
                overwrite(path, at, struct.pack("<II", mpp, 100))
        case _:
            tifffile.imwrite(path, RGB, **TILES, **{**PER_CM, "resolution": (1e4 / 0.5, 1e4 / 0.55)})
    reason = refusal(path)
    x, y = ("0.5", "0.55") if case == "10%" else ("0.25", "0.5")
    assert reason.startswith(f"mpp-not-square: the file states {x} microns per px along x and {y} along y")
    assert "vips resize" in reason
    _, slide = stored(path, mpp=0.5)
    assert slide is not None
    assert slide.mpp == 0.5


def test_resampled_as_the_reason_says_it_is_the_true_picture(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips")
    wide = np.repeat(RGB, 2, axis=1)
    tifffile.imwrite(tmp_path / "a.tif", wide, **TILES, **{**PER_CM, "resolution": (2e4 / MPP, 1e4 / MPP)})
    reason = refusal(tmp_path / "a.tif")
    assert "`vips resize IN OUT.tiff[tile,pyramid] 0.5 --vscale 1`) and give 0.5 in the cohort's mpp column" in reason
    image = pyvips.Image.new_from_file(str(tmp_path / "a.tif")).resize(0.5, vscale=1, kernel="linear")
    image.tiffsave(str(tmp_path / "square.tiff"), tile=True, pyramid=True, tile_width=PATCH, tile_height=PATCH)
    check_patches(tmp_path / "square.tiff", mpp=MPP)


@pytest.mark.parametrize("how", ["tiles", "strips", "one strip"])
@pytest.mark.parametrize("compression", ["none", "lzw", "jpeg"])
def test_microns_that_stand_in_the_xml_alone(tmp_path: Path, how: str, compression: str) -> None:
    cut: dict[str, dict[str, Any]] = {
        "tiles": {"tile": (PATCH, PATCH)},
        "strips": {"rowsperstrip": 48},
        "one strip": {},
    }
    quality: dict[str, Any] = {"compressionargs": {"level": 97}, "subsampling": (1, 1)} if compression == "jpeg" else {}
    metadata = {"axes": "YXS", **PHYSICAL}
    options: dict[str, Any] = {"photometric": "rgb", "compression": compression, **cut[how], **quality}
    tifffile.imwrite(tmp_path / "a.ome.tif", RGB, metadata=metadata, **options)
    check_patches(tmp_path / "a.ome.tif")


@pytest.mark.parametrize("encoding", ["utf-8", "shift-jis", "cp1252", "euc-jp"])
def test_an_aperio_description_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    user = "Böhm" if encoding == "cp1252" else "小川ポ"  # in Shift-JIS one of its bytes is a "|"
    text = f"Aperio Image Library v11.2.1 \r\n613x487 (64x64) JPEG/RGB|AppMag = 20|User = {user}|MPP = 0.5000|Left = 25"
    path = write_tiles(
        tmp_path / "a.svs", RGB, PATCH, as_jfif, compression=7, photometric=6, description=text.encode(encoding)
    )
    check_patches(path)


def test_cmyk_is_refused(tmp_path: Path) -> None:
    cmyk = np.dstack([255 - RGB, np.zeros(RGB.shape[:2], np.uint8)])
    options: dict[str, Any] = {"tile": (PATCH, PATCH), "photometric": "separated", "compression": "lzw"}
    tifffile.imwrite(tmp_path / "a.tif", cmyk, **options, **PER_CM)
    assert refusal(tmp_path / "a.tif").startswith("pixel-type: a.tif: CMYK")


@pytest.mark.parametrize("reader", ["ours", "openslide"])
def test_what_a_file_states_is_recorded(tmp_path: Path, reader: str) -> None:
    """Microns along both axes, and the colour profile, which is not applied."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kind: dict[str, Any] = {"resolution": (2e4, 2.01e4), "resolutionunit": 3, "metadata": None, "iccprofile": srgb}
    if reader == "ours":
        tifffile.imwrite(tmp_path / "a.tif", RGB, **TILES, **kind)
    else:
        greys = np.stack([np.arange(256, dtype=np.uint16) * 257] * 3)
        options: dict[str, Any] = {"tile": (PATCH, PATCH), "photometric": "palette", "colormap": greys}
        tifffile.imwrite(tmp_path / "a.tif", PLANES[1], **options, **kind)
    spec = SPEC.model_copy(update={"tissue": "none"})
    status, _ = stored(tmp_path / "a.tif", spec)
    facts = PatchStore(str(tmp_path / "store"), spec.fingerprint()).facts(str(status.key))
    assert facts["stated_mpp"] == pytest.approx([0.5, 0.497512], abs=1e-6)
    assert facts["mpp"] == pytest.approx((0.5 * 0.497512) ** 0.5, abs=1e-6)
    assert facts["icc_profile"] == "sRGB built-in"
