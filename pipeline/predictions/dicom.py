"""The maps of a DICOM slide as DICOM Parametric Maps, for archives of slides and the viewers that lay them over these.

One instance a map, float32, all in one series of the slide's study. Its px are those of one level of the slide, tile
by tile, for viewers draw a map of another grid at a wrong place: the coarsest whose px are no larger than a patch.
Its UIDs follow from the slide's and from the numbers, and so do all of its bytes: what is sent twice is the same.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, PipelineError, SlideError
from pipeline.slides.folders import SUFFIX, main_file
from pipeline.slides.identity import reading_source, slide_files
from pipeline.storage import files
from pipeline.storage.ranges import SourceFile

MAX_PX = 2**25
"""Of a map, which no transfer syntax compresses: 128 MiB."""
_BLOCK = 2**16  # bytes read of a header at a time
_HIGH = 32.0  # times uniform attention, where the window of every slide ends: two slides compare
_SERIES = 100  # added to the number of the slide's series

Numbers = npt.NDArray[Any]
Image = Any
"""A pydicom data set without its px."""


def load_highdicom() -> ModuleType:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        problem = f"--dicom needs highdicom, which is absent ({error}); run: pip install 'ips-pipeline[dicom]'"
        raise ConfigError("predict", [f"{problem}, on every node"]) from error
    return highdicom  # type: ignore[no-any-return]


def write_maps(uri: str, facts: Mapping[str, Any], columns: Mapping[str, Numbers], folder: Path) -> list[str]:
    """Write a map for `attention` and each effect of a slide; their names.

    Args:
        uri: of the slide.
        facts: what `slide.json` says.
        columns: `x`, `y` and the maps, as in `attention.parquet`.
        folder: for the files.

    Raises:
        SlideError: "dicom", the slide is no DICOM slide, or one that no map can be laid over; or a file of it cannot be
            read.
    """
    try:
        with reading_source():
            return _write(uri, facts, columns, folder)
    except PipelineError:
        raise
    except Exception as error:  # of the libraries, about what these files say
        raise SlideError(
            "dicom", f"{uri}: no map can be laid over it as its files are ({type(error).__name__}: {error})"
        ) from error


def _write(uri: str, facts: Mapping[str, Any], columns: Mapping[str, Numbers], folder: Path) -> list[str]:
    source, base, scale = _aligned(_images(uri), facts)
    names = [name for name in columns if name == "attention" or name.startswith("effect_")]
    digest = hashlib.sha256(str(facts["model"]["digest"]).encode())
    for name in ("x", "y", *names):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    content = [str(source.SOPInstanceUID), digest.hexdigest()]
    written = []
    for number, name in enumerate(names, start=1):
        size = int(source.TotalPixelMatrixColumns), int(source.TotalPixelMatrixRows)
        pixels = raster(columns["x"], columns["y"], columns[name], facts["patch"], size, scale)
        made = _parametric_map(source, base, pixels, name, number, facts, content)
        made.save_as(folder / f"{name}.dcm")
        written.append(f"{name}.dcm")
    return written


def raster(
    x: Numbers, y: Numbers, values: Numbers, patch: float, size: tuple[int, int], scale: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """A map as an image (height, width): each px has the value of the patch that its centre is in.

    Where patches overlap it has their mean, and 0 where there is none.

    Args:
        x: (n,) level-0 px of the patches' left edges.
        y: (n,) of their upper edges.
        values: (n,).
        patch: edge of a patch, level-0 px.
        size: width and height of the image.
        scale: level-0 px per px, along x and y.
    """
    total, count = np.zeros(size[::-1]), np.zeros(size[::-1], np.int32)
    edges = [
        np.clip(np.ceil((low + shift) / step - 0.5), 0, most).astype(int)
        for low, step, most in ((x, scale[0], size[0]), (y, scale[1], size[1]))
        for shift in (0.0, patch)
    ]
    for left, right, top, bottom, value in zip(*(edge.tolist() for edge in edges), values.tolist(), strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return (total / np.maximum(count, 1)).astype(np.float32)


def _images(uri: str) -> list[Image]:
    """The images of the tissue, the one at full resolution first."""
    main = main_file(uri)
    if not main.lower().endswith(SUFFIX):
        raise SlideError("dicom", f"{uri}: it is no DICOM slide, so there is no series that a map could be laid over")
    found = [image for image in map(_image, slide_files(main)) if _is_tissue(image)]
    return sorted(found, key=lambda image: -int(image.TotalPixelMatrixColumns))


def _image(uri: str) -> Image:
    import pydicom

    size = files.source_version(uri).size
    source = _NamedFile(size, lambda wanted: files.read_ranges(uri, [wanted])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that only break a rule of their form
        return pydicom.dcmread(io.BufferedReader(source, _BLOCK), stop_before_pixels=True)


class _NamedFile(SourceFile):
    """The library asks every file for its name."""

    name = "slide"


def _is_tissue(image: Image) -> bool:
    return "TotalPixelMatrixColumns" in image and list(image.ImageType)[2:3] == ["VOLUME"]


def _aligned(images: Sequence[Image], facts: Mapping[str, Any]) -> tuple[Image, Image, tuple[float, float]]:
    """The image whose px the maps take, that at full resolution, and level-0 px per px of the former."""
    width, height = facts["dimensions"]
    sizes = [(int(image.TotalPixelMatrixColumns), int(image.TotalPixelMatrixRows)) for image in images]
    if not sizes or sizes[0] != (width, height):
        told = f"{sizes[0][0]} x {sizes[0][1]} px" if sizes else "no image of the tissue"
        raise SlideError("dicom", f"{facts['uri']}: its files say {told} where the slide has {width} x {height} px")
    if any(int(image.get(name) or 1) > 1 for image in images for name in _STACKS):
        raise SlideError("dicom", f"{facts['uri']}: it has several focal planes or optical paths; a map is of one")
    scales = [_scale(image, images[0]) for image in images]
    place = max(number for number, scale in enumerate(scales) if number == 0 or max(scale) <= facts["patch"])
    columns, rows = sizes[place]
    if (
        abs(columns * scales[place][0] - width) > scales[place][0]
        or abs(rows * scales[place][1] - height) > scales[place][1]
    ):
        raise SlideError(
            "dicom",
            f"{facts['uri']}: its level of {columns} x {rows} px says that its px are {scales[place][0]:g} times those "
            f"at full resolution, of which there are {width} x {height}; correct PixelSpacing",
        )
    if columns * rows > MAX_PX:
        raise SlideError(
            "dicom",
            f"{facts['uri']}: its coarsest level whose px are no larger than a patch has {columns} x {rows} px, and a "
            f"map may have {MAX_PX:,}; write smaller levels into the slide's series",
        )
    return images[place], images[0], scales[place]


def _scale(image: Image, base: Image) -> tuple[float, float]:
    """Px of `base` in a px of the image along x and y, as they say: viewers go by that, not by how many there are."""
    (rows, columns), (base_rows, base_columns) = (
        map(float, one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing) for one in (image, base)
    )
    return columns / base_columns, rows / base_rows


_STACKS = ("TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths")


def _parametric_map(
    source: Image,
    base: Image,
    pixels: npt.NDArray[np.float32],
    name: str,
    number: int,
    facts: Mapping[str, Any],
    content: Sequence[str],
) -> Any:
    hd = load_highdicom()
    from pydicom.sr.codedict import codes

    said = facts["maps"][name]
    meaning = "attention" if name == "attention" else "effect"
    low, high = _window(name, pixels, facts)
    reach = float(min(pixels.min(), 0.0)), float(max(pixels.max(), 1.0))
    made = hd.pm.ParametricMap(
        [source],
        pixels,
        series_instance_uid=_uid(*content, "series"),
        series_number=int(source.get("SeriesNumber") or 0) + _SERIES,
        sop_instance_uid=_uid(*content, name),
        instance_number=number,
        manufacturer="IPS Pipeline",
        manufacturer_model_name="ips-pipeline",
        software_versions=version("ips-pipeline"),
        device_serial_number=facts["model"]["digest"][:16],
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            hd.pm.RealWorldValueMapping(
                lut_label=meaning,
                lut_explanation=_text(f"{name}: {said['unit']}"),
                unit=codes.UCUM.NoUnits,
                value_range=reach,
                quantity_definition=codes.DCM.ClassActivation,
            )
        ],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=(low + high) / 2, window_width=high - low)],
        content_label=meaning.upper(),
        content_description=_text(f"{name}, {said['version']}"),
        series_description=_text(f"Maps of {facts['model']['source']}"),
        further_source_images=[] if base is source else [base],
        tile_pixel_array=True,
        dimension_organization_type="TILED_FULL",
    )
    return _settled(made, source, _uid(*content, name, "dimensions"))


def _window(name: str, pixels: Numbers, facts: Mapping[str, Any]) -> tuple[float, float]:
    """What a viewer is to show of black to white; of an effect its largest, to both sides."""
    if name == "attention":
        return 0.0, _HIGH / facts.get("patient", facts)["n_patches"]
    most = float(np.abs(pixels).max()) or 1.0
    return -most, most


def _settled(made: Any, source: Image, organization: str) -> Any:
    """Without what differs from one writing to the next, for the instance is the same: times, and a UID of chance."""
    made.ContentDate, made.ContentTime = source.ContentDate, source.ContentTime
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in made:
            delattr(made, keyword)
    for item in made.get("ContributingEquipmentSequence", ()):
        if "ContributionDateTime" in item:
            del item.ContributionDateTime
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in made.get(sequence, ()):
            item.DimensionOrganizationUID = organization
    return made


def _uid(*parts: str) -> str:
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=["ips-pipeline", *parts]))


def _text(words: str) -> str:
    """A LO of DICOM: 64 characters, here of ASCII, for the slide's character set need not have others."""
    return words.encode("ascii", "replace").decode().replace("\\", "/")[:64]
