"""What is given beside a slide to say where its patches are: a tissue mask, or another tool's patch coordinates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.tiling.interchange import Coordinates, file_names, read_coordinates, require_h5py
from pipeline.tiling.masks import ExternalMask, read_mask


@dataclass(frozen=True)
class Guide:
    """Of one slide. Where there are coordinates they are the patches, whatever a mask says."""

    mask: ExternalMask | None = None
    coords: Coordinates | None = None
    digest: str | None = None
    """sha256 (hex) of the files' content; None without files."""


def check_environment(slides: Iterable[CohortSlide], spec: TilingConfig) -> None:
    """Whether what is given beside the slides can be read at all; nothing is opened.

    Raises:
        ConfigError: there are patch coordinates, and h5py is not installed.
    """
    if spec.coords is not None or any(slide.coords is not None for slide in slides):
        require_h5py()


def guide_files(slide: CohortSlide, spec: TilingConfig) -> tuple[str | None, str | None]:
    """URIs of the slide's mask and of its coordinates, where it has them.

    The coordinates are the cohort's, else the file in `spec.coords` that bears the slide's id, as `export` writes it,
    or its file's name.

    Raises:
        SlideError: "coords", `spec.coords` has none for the slide.
    """
    if slide.coords is not None or spec.coords is None:
        return slide.mask, slide.coords
    stem = slide.uri.rpartition("/")[2].rpartition(".")[0]
    names = file_names(slide.slide_id, stem)
    for name in names:
        if files.exists(uri := files.join(spec.coords, name)):
            return slide.mask, uri
    raise SlideError(
        "coords", f"tiling.coords={spec.coords} has none of {', '.join(names)}; add the file or leave the slide out"
    )


def read_guide(slide: CohortSlide, spec: TilingConfig) -> Guide:
    """Read the slide's mask and coordinates.

    Raises:
        SlideError: "coords".
        StorageError: a file that the cohort names cannot be read.
    """
    mask_uri, coords_uri = guide_files(slide, spec)
    if mask_uri is None and coords_uri is None:
        return Guide()
    mask = None if mask_uri is None else read_mask(mask_uri)
    data = None if coords_uri is None else files.read_bytes(coords_uri)
    coords = None if data is None else read_coordinates(data, str(coords_uri))
    digests = [mask and mask.digest, data and hashlib.sha256(data).hexdigest()]
    return Guide(mask, coords, hashlib.sha256(json.dumps(digests).encode()).hexdigest())


def guided_version(slide: CohortSlide, spec: TilingConfig, version: SourceVersion) -> SourceVersion:
    """The slide's version, made another one by every change of its mask or coordinates.

    Raises:
        SlideError: "coords".
        StorageError: a file that the cohort names cannot be reached.
    """
    given = [uri for uri in guide_files(slide, spec) if uri is not None]
    if not given:
        return version
    versions = [[uri, asdict(files.source_version(uri))] for uri in given]
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]
    return replace(version, etag=f"{version.etag or ''}+{digest}")
