"""Where a slide's patches come from: the one place that knows every kind of source.

A *source* is a handle of one slide's patches. The driver makes it (`open_sources`) and reads its facts; it travels by
pickle to whoever trains or evaluates; there `open_bag` gives the `ips` bag. Everything else sees `PatchSource` and
`Bag` only.

A new kind needs a frozen dataclass that meets `PatchSource`, its name in `Source`, and a case in `open_bag` (mypy asks
for it) and in `open_sources`. Its bag must give the same patches for the same row whenever it is asked, because the
gradient pass takes again what the selection has scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, assert_never

import numpy as np
import numpy.typing as npt

from ips.bag import Bag
from pipeline.bags.augment import Augment
from pipeline.bags.embed import EmbeddedBag, encoder_fingerprint
from pipeline.bags.feature_bag import FeatureBag
from pipeline.bags.given import GivenSlide, open_given
from pipeline.bags.images import PastedImage, open_image
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.patients import PatientSlides
from pipeline.bags.streamed import EmbeddedSlide, StreamedSlide, open_streamed, plan_root
from pipeline.cohort.table import CohortSlide
from pipeline.columnar import mapped, together
from pipeline.config.embed import EmbedConfig
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError, SlideError
from pipeline.ingest.versions import Looked, look_at
from pipeline.storage import files
from pipeline.store.features import FeatureSlide, FeatureStore
from pipeline.store.patches import GIVEN, OnPatches, PatchStore, SlideStatus, StoredSlide

Ints = npt.NDArray[np.int64]


class Corners(Protocol):
    """Where patches stand: (n,) level-0 px of their left and upper edges, by row."""

    @property
    def x(self) -> Ints: ...  # noqa: D102
    @property
    def y(self) -> Ints: ...  # noqa: D102


class PatchSource(Protocol):
    """One slide's patches: small, picklable, nothing read before it is asked for."""

    @property
    def key(self) -> str:
        """Names the content: equal keys, equal patches. Enters fingerprints and the training plan."""
        ...

    @property
    def n_patches(self) -> int:
        """N, the length of the bag."""
        ...

    @property
    def n_bad_tiles(self) -> int:
        """Patches that could not be read, and are not among the N."""
        ...

    @property
    def extent(self) -> float:
        """Edge of a patch, level-0 px."""
        ...

    @property
    def thumbnail_scale(self) -> float:
        """Level-0 px per px of the thumbnail."""
        ...

    @property
    def mpp(self) -> float | None:
        """Microns per level-0 px; None where it is not known."""
        ...

    def index(self) -> Corners:
        """Where the patches stand."""
        ...

    def payloads(self, rows: Ints) -> list[bytes]:
        """The patches of `rows` as JPEGs, for people."""
        ...

    def thumbnail(self) -> bytes:
        """The slide as a JPEG of at most 512 px."""
        ...


Source = StoredSlide | PastedImage | FeatureSlide | StreamedSlide | GivenSlide | EmbeddedSlide
BagSource = Source | PatientSlides
LabelledSource = tuple[CohortSlide, BagSource]


def slides_of(source: BagSource) -> Sequence[Source]:
    """One by one."""
    return source.slides if isinstance(source, PatientSlides) else (source,)


def open_bag(source: BagSource, *, threads: int, augment: Augment | None) -> Bag:
    """The bag of one slide, or of a patient's.

    Args:
        source: which one.
        threads: that may decode at a time.
        augment: None for evaluation.
    """
    match source:
        case StoredSlide() | StreamedSlide():
            return PatchBag([source], threads=threads, augment=augment)
        case PastedImage():
            return source.bag()  # the config refuses to flip digits
        case FeatureSlide() | GivenSlide():
            return FeatureBag([source])  # the config refuses to flip features
        case EmbeddedSlide():
            return EmbeddedBag([source], threads)
        case PatientSlides():
            if made := [slide for slide in source.slides if isinstance(slide, EmbeddedSlide)]:
                return EmbeddedBag(made, threads)
            pixels = [slide for slide in source.slides if isinstance(slide, StoredSlide | StreamedSlide)]
            vectors = [slide for slide in source.slides if isinstance(slide, FeatureSlide | GivenSlide)]
            return PatchBag(pixels, threads=threads, augment=augment) if pixels else FeatureBag(vectors)
        case _:
            assert_never(source)


def content_of(source: Source) -> str:
    """Digest of the slide's content, whatever its microns, mask and tiling; one small read.

    Raises:
        StorageError: its commit cannot be read.
    """
    stored = stored_of(source)
    return source.key if stored is None else str(stored.facts()["content"])


def contents(config: Config, sources: Iterable[Source]) -> set[str]:
    """Keys of slides of a run of the config, and digests of their content, as `content_of`; one look at the catalogue.

    Raises:
        StorageError: the catalogue cannot be read.
    """
    keys, stored = set[str](), set[str]()
    for source in sources:  # one after another: a million of them at a time take a gigabyte
        keys.add(source.key)
        stored.add(source.key if (below := stored_of(source)) is None else below.key)
    if config.cohort.megapixel_mnist is not None:
        return keys | stored
    return keys | {str(facts["content"]) for _, facts in patch_store(config).all_facts(list(stored))}


def stored_of(source: Source) -> StoredSlide | None:
    """The committed slide, or plan of one, that a source rests on; None of a generated image."""
    match source:
        case StoredSlide():
            return source
        case OnPatches():
            return source.patches
        case PastedImage():
            return None
        case _:
            assert_never(source)


def patch_bytes(source: Source) -> int:
    """Of the patches that a reading of a slide takes; 0 of those that are drawn."""
    match source:
        case StoredSlide():
            return int(np.sum(source.index().length))
        case FeatureSlide():
            return source.n_patches * source.dim * (2 if source.dtype == "float16" else 4)
        case _:
            return 0


def patch_store(config: Config) -> PatchStore:
    """The store of the config's tiling spec; that of plans where patches are streamed or are features given."""
    return PatchStore(patch_root(config), config.tiling.fingerprint())


def patch_root(config: Config) -> str:
    """Root of that store."""
    assert config.storage.patches is not None  # compose.py fills it
    if config.given_features:
        return files.join(config.storage.patches, GIVEN)
    return plan_root(config.storage.patches) if config.train.source == "stream" else config.storage.patches


def open_sources(
    config: Config,
    slides: Sequence[CohortSlide],
    keys: Mapping[str, str],
    versions: Sequence[Looked] | None = None,
    store: PatchStore | None = None,
) -> Sequence[LabelledSource]:
    """The sources of slides that the tile stage has committed under `keys` (slide id -> key).

    `versions` are those of the slides' files, where they were looked at already; only those of plans are. `store` is
    `patch_store(config)`, where it was looked at already.

    Raises:
        StorageError: one is gone.
        ConfigError: features are not as wide as the model takes them.
    """
    if config.cohort.megapixel_mnist is not None:
        return [(slide, open_image(config.cohort.megapixel_mnist, config.tiling, slide.uri)) for slide in slides]
    store, wanted = store or patch_store(config), [keys[slide.slide_id] for slide in slides]
    if config.planned:
        looked = look_at(slides, config.tiling) if versions is None else versions
        if config.given_features:
            given = open_given(slides, looked, store, wanted)
            check_width(config, given)
            return together(slides, given)
        return mapped(_with_row, open_streamed(slides, looked, config.tiling, store, wanted))
    stored = store.slides(wanted)
    if config.model.encoder.name != "features":
        return together(slides, stored)
    features = feature_store(config)[0].slides(stored)
    check_width(config, features)
    return together(slides, features)


def _with_row(streamed: StreamedSlide) -> LabelledSource:
    return streamed.slide, streamed


def feature_store(config: Config, root: str | None = None) -> tuple[FeatureStore, EmbedConfig]:
    """The store of the config's tiling spec and encoder, below `root` or where the config says; and its settings.

    Raises:
        ConfigError: the config names no encoder.
        StorageError: the encoder's weights cannot be read.
    """
    if config.embed is None:
        raise ConfigError("config", ["embed: is required to make features; give embed.encoder.name=resnet50"])
    root = root or config.storage.features
    assert root is not None  # compose.py fills it
    return FeatureStore(root, config.tiling.fingerprint(), encoder_fingerprint(config.embed)), config.embed


def check_width(config: Config, slides: Sequence[FeatureSlide | GivenSlide | EmbeddedSlide]) -> None:
    """ConfigError where features are not as wide as the model takes them."""
    for slide in slides:
        if slide.dim != config.model.encoder.features:
            asked = f"model.encoder.features: {config.model.encoder.features}"
            problem = f"{asked}, but those of {slide.uri} have {slide.dim}; set model.encoder.features={slide.dim}"
            raise ConfigError("config", [problem])


def image_statuses(config: Config, slides: Sequence[CohortSlide]) -> list[SlideStatus]:
    """What the tile stage says of generated images: they are there, or their row names none."""
    assert config.cohort.megapixel_mnist is not None
    statuses = []
    for slide in slides:
        try:
            image = open_image(config.cohort.megapixel_mnist, config.tiling, slide.uri)
        except SlideError as error:
            reason = f"{error.reason}: {error}"
            statuses.append(SlideStatus(slide.slide_id, slide.uri, None, "quarantined", reason))
        else:
            statuses.append(SlideStatus(slide.slide_id, slide.uri, image.key, "committed", None, image.n_patches))
    return statuses
