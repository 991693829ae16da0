"""What is given beside a slide to say where its patches are: a tissue mask, or another tool's patch coordinates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.config.tissue import TissueModelConfig
from pipeline.errors import SlideError, StorageError
from pipeline.segmentation.network import FIELD, open_network, read_network
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.storage.listing import Ask
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
    """Whether what is given beside the slides can be read at all; no slide is opened.

    Raises:
        ConfigError: there are patch coordinates, and h5py is not installed.
    """
    if spec.coords is not None or any(slide.coords is not None for slide in slides):
        require_h5py()


def check_network(slides: Iterable[CohortSlide], spec: TilingConfig) -> None:
    """Whether the network that finds the tissue of slides that are to be tiled is there; nothing of it is run.

    Raises:
        ConfigError: it is another file than the one that is named, or none that can be run here.
        StorageError: it cannot be read.
    """
    if spec.tissue_model is None or spec.coords is not None:
        return
    if any(slide.mask is None and slide.coords is None for slide in slides):
        with _naming(spec.tissue_model):
            read_network(spec.tissue_model)


def load_network(spec: TilingConfig, guide: Guide) -> None:
    """Load the network that finds a slide's tissue, where one does; a process does so once.

    Raises:
        ConfigError: see `open_network`.
        StorageError: its file cannot be read.
    """
    if spec.tissue_model is not None and guide.mask is None and guide.coords is None:
        with _naming(spec.tissue_model):
            open_network(spec.tissue_model)


@contextmanager
def _naming(settings: TissueModelConfig) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        problem = f"{FIELD}.uri={settings.uri}: {error}; every node that tiles must reach the file"
        raise StorageError(problem) from error


def may_guide(slide: CohortSlide, spec: TilingConfig) -> list[str]:
    """URIs of all files that may be given beside the slide: its mask, and its coordinates by each name.

    The coordinates are the cohort's, else the file in `spec.coords` that bears the slide's id, as `export` writes it,
    or its file's name.
    """
    given = [uri for uri in (slide.mask, slide.coords) if uri is not None]
    if slide.coords is not None or spec.coords is None:
        return given
    stem = slide.uri.rpartition("/")[2].rpartition(".")[0]
    return [*given, *(files.join(spec.coords, name) for name in file_names(slide.slide_id, stem))]


def guide_files(
    slide: CohortSlide, spec: TilingConfig, ask: Ask = files.source_version
) -> tuple[str | None, str | None]:
    """URIs of the slide's mask and of its coordinates, where it has them.

    Raises:
        SlideError: "coords", `spec.coords` has none for the slide.
        StorageError: it cannot be reached.
    """
    if slide.coords is not None or spec.coords is None:
        return slide.mask, slide.coords
    candidates = may_guide(slide, spec)[slide.mask is not None :]
    for uri in candidates:
        if _is_there(uri, ask):
            return slide.mask, uri
    names = ", ".join(uri.rpartition("/")[2] for uri in candidates)
    raise SlideError("coords", f"tiling.coords={spec.coords} has none of {names}; add the file or leave the slide out")


def _is_there(uri: str, ask: Ask) -> bool:
    try:
        ask(uri)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True


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


def guided_version(
    slide: CohortSlide, spec: TilingConfig, version: SourceVersion, ask: Ask = files.source_version
) -> SourceVersion:
    """The slide's version, made another one by every change of its mask or coordinates, whose versions `ask` gives.

    Raises:
        SlideError: "coords".
        StorageError: a file that the cohort names cannot be reached.
    """
    given = [uri for uri in guide_files(slide, spec, ask) if uri is not None]
    if not given:
        return version
    versions = [[uri, asdict(ask(uri))] for uri in given]
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]
    return replace(version, etag=f"{version.etag or ''}+{digest}")
