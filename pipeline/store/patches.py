"""The patch store: which slides are committed, what became of each source, and exact reads.

A slide's folder is whole once it holds `slide.json`, which is written last (`README.md` has the layout). All its bytes
follow from the slide's content, the spec and the image libraries: two writers of one slide write the same files, or
parts under other names, and a lost race harms nothing. `catalogue/` is what readers look at: which slides there are,
and which version of each source gave which, or why none; `unfinished/` says which parts are whole of a slide that
several tasks share, until it is committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import Columnar
from pipeline.config.base import fingerprint
from pipeline.errors import StorageError
from pipeline.schema import INDEX, SCHEMA_VERSION
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.storage.tree import delete_folder
from pipeline.store.catalogue import BATCH, Row
from pipeline.store.index import Ints, PatchIndex, folder_origins, folder_table, read_rows, slide_index
from pipeline.store.packs import PACKS, Place, read_facts, read_index
from pipeline.store.pictures import drawn
from pipeline.store.rows import asked_digest, outcome, slide_row, source_row, stored
from pipeline.store.shelf import Shelf
from pipeline.tiling.evidence import MASK, OUTLINE, THUMBNAIL, read_mask_png
from pipeline.tiling.geojson import tissue_geojson
from pipeline.tiling.grid import cells_at

UNFINISHED = "unfinished"
"""Folder beside those of the slides."""
_DETAILS, _COUNTS = ["error", "picture"], ["n_patches", "n_bad_tiles"]
_OUTCOME = ["id", "key", "status", "reason", "max_seconds", "max_gib", *_COUNTS]
_ASKED = pa.schema([("asked", pa.string())])
PLANS, GIVEN = APART = "plans", "given"
"""Folders below the root: a store of slides without parts (`commit.write_plan`), and one of files of features, whose
vectors the index leads to (`pipeline.ingest.features`)."""


@dataclass(frozen=True, slots=True)
class SlideStatus:
    """What became of one row of the cohort."""

    slide_id: str
    uri: str
    key: str | None
    """The stored slide; None when quarantined."""
    status: Literal["committed", "quarantined"]
    reason: str | None = None
    """Short category, then the message; None when committed."""
    n_patches: int = 0
    n_bad_tiles: int = 0
    error: str | None = None
    """Traceback."""
    picture: str | None = None
    """A quarantined slide in small, a JPEG in base64, where it was seen before it was given up."""
    limits: tuple[float, float] | None = None
    """Where it was too expensive: the `tiling.max_seconds` and `tiling.max_slide_gib` that were not enough."""
    version: SourceVersion | None = field(default=None, compare=False)
    """Of the source as it was read, where it was; it may have been replaced since somebody asked for it."""


@dataclass(frozen=True)
class StoredSlide:
    """A committed slide. Small, picklable; patches and index are read when asked for."""

    uri: str
    """Folder of the slide in the store, or the pack that it is in."""
    key: str
    n_patches: int
    n_bad_tiles: int
    """Patches that could not be decoded, and are not among the `n_patches`."""
    patch_px: int
    level: int
    """Pyramid level that was read."""
    downsample: float
    """Level-0 px per patch px."""
    stride: float
    """Level-0 px from one grid column or row to the next."""
    mpp: float | None
    """Microns per level-0 px; None when level 0 was read as it is."""
    dimensions: tuple[int, int]
    """Width and height of the slide, level-0 px."""
    thumbnail_scale: float
    """Level-0 px per px of the thumbnail."""
    imported: bool
    """Its patches stand where a file said, not on a grid."""
    place: Place | None = None
    """In the pack that `uri` is; None: `uri` is a folder of its own."""
    context_mpp: float | None = None
    """Microns per px of the second picture that each patch has of its surroundings; None: it has none."""

    @property
    def extent(self) -> float:
        """Edge of a patch, in level-0 px."""
        return self.downsample * self.patch_px

    def index(self) -> PatchIndex:
        """Position and place of every patch; the last few slides' are kept in memory."""
        return slide_index(self.uri, self.place, self.n_patches)

    def index_table(self) -> pa.Table:
        """The index in schema INDEX."""
        if self.place is None:
            return folder_table(self.uri).select(INDEX.names)
        index = self.index()
        cells, rows = read_index(self.uri, self.place, self.n_patches)[:, 0], np.arange(self.n_patches)
        level = np.full(len(rows), self.level)
        columns = (rows, cells, index.x, index.y, level, index.part, index.offset, index.length)
        return pa.table([pa.array(column).cast(of.type) for column, of in zip(columns, INDEX, strict=True)], INDEX)

    def origins(self) -> Ints:
        """(n, 2) left and top of the patches of a plan (`commit.write_plan`), px of the level that is read."""
        if self.place is None:
            return folder_origins(self.uri, self.n_patches)
        return read_index(self.uri, self.place, self.n_patches)[:, 4:].astype(np.int64)

    def positions(self, rows: Ints) -> Ints:
        """(n, 2) grid column and row of `rows` (n,); of imported patches in strides from the corner, rounded."""
        index = self.index()
        corners = np.stack([index.x[rows], index.y[rows]], axis=1)
        return np.rint(corners / self.stride).astype(np.int64) if self.imported else cells_at(corners, self.stride)

    def payloads(self, rows: Sequence[int] | Ints) -> list[bytes]:
        """The JPEGs of `rows`, in their order: one range read for each run of neighbours, exactly its bytes.

        With `context_mpp` two each, one after the other (`tiling.cutting.split`).
        """
        return read_rows(self.uri, self.place, self.n_patches, rows)

    def facts(self) -> Mapping[str, Any]:
        """All that its commit says."""
        if self.place is not None:
            return read_facts(self.uri, self.place)
        facts: Mapping[str, Any] = files.read_json(files.join(self.uri, "slide.json"))
        return facts

    def thumbnail(self) -> bytes:
        """The slide's thumbnail, a JPEG of at most 512 px; of a packed slide it is drawn of its patches."""
        if self.place is None:
            return files.read_bytes(files.join(self.uri, THUMBNAIL))
        overview = self._kept(self.place.overview, self.place.overview_bytes)
        images = [] if self.place.planned else self.payloads(np.arange(self.n_patches))
        index = self.index()
        corners = np.stack([index.x, index.y], axis=1)[: len(images)]
        return drawn(overview, self.dimensions, self.thumbnail_scale, images, corners, self.extent)

    def mask(self) -> bytes:
        """Where the tissue is: a PNG of one bit a px over the whole slide."""
        if self.place is None:
            return files.read_bytes(files.join(self.uri, MASK))
        return self._kept(self.place.mask, self.place.mask_bytes)

    def outline(self) -> bytes:
        """The tissue's outlines as GeoJSON, for QuPath."""
        if self.place is None:
            return files.read_bytes(files.join(self.uri, OUTLINE))
        return tissue_geojson(read_mask_png(self.mask()), self.dimensions)

    def _kept(self, offset: int, length: int) -> bytes:
        return files.read_ranges(self.uri, [(offset, length)])[0]


@dataclass(frozen=True)
class OnPatches:
    """What rests on a slide's patches and says of it what these say: features of them, or what they are cut from."""

    patches: StoredSlide
    """Committed, or as they were planned (`commit.write_plan`)."""

    @property
    def key(self) -> str:
        """Names the content."""
        return self.patches.key

    @property
    def n_patches(self) -> int:
        """N."""
        return self.patches.n_patches

    @property
    def n_bad_tiles(self) -> int:
        """Patches that cannot be decoded, and are not among the N."""
        return self.patches.n_bad_tiles

    @property
    def extent(self) -> float:
        """Edge of a patch, level-0 px."""
        return self.patches.extent

    @property
    def thumbnail_scale(self) -> float:
        """Level-0 px per px of the thumbnail."""
        return self.patches.thumbnail_scale

    @property
    def mpp(self) -> float | None:
        """Microns per level-0 px; None where it is not known."""
        return self.patches.mpp

    def index(self) -> PatchIndex:
        """Where each patch stands, and where what there is of it lies."""
        return self.patches.index()

    def positions(self, rows: Ints) -> Ints:
        """See `StoredSlide.positions`."""
        return self.patches.positions(rows)

    def thumbnail(self) -> bytes:
        """The slide as a JPEG of at most 512 px."""
        return self.patches.thumbnail()


class PatchStore(Shelf):
    """The slides tiled with one spec."""

    def __init__(self, root: str, spec_fingerprint: str) -> None:
        super().__init__(files.join(root, spec_fingerprint))
        self.spec_fingerprint = spec_fingerprint

    def record(self, slide: CohortSlide, version: SourceVersion, status: SlideStatus, left: str | None = None) -> None:
        """Commit what became of this version of the source, and the slide that it became, which has a folder.

        `left` is the key under which a slide that was given up left files.
        """
        self.append(self.rows(slide, version, status, left))

    def rows(
        self, slide: CohortSlide, version: SourceVersion, status: SlideStatus, left: str | None = None
    ) -> list[Row]:
        """What `record` commits."""
        source = source_row(slide, version, asdict(status), left)
        facts = None if status.key is None else self.written(status.key)
        return [source] if facts is None else [source, slide_row(facts)]

    def statuses(
        self, slides: Sequence[CohortSlide], versions: Iterable[SourceVersion | None]
    ) -> Iterator[SlideStatus | None]:
        """What became of these versions of the sources; None of one that was never tiled, or whose slide is gone."""
        digests = (None if v is None else asked_digest(s, v) for s, v in zip(slides, versions, strict=True))
        asked = Columnar.of(((digest,) for digest in digests), _ASKED, str).table["asked"]
        places = self.view.source_places(asked)
        sources = self._counted(self.view.sources.select(_OUTCOME).take(places.drop_null()))
        refused = sources.filter(pc.is_null(sources["key"]))["id"].combine_chunks()
        batches = self.catalogue.wide(self.view, _DETAILS, refused) if len(refused) else ()
        details = {row["id"]: row for rows in batches for row in rows.to_pylist()}
        gone = set(self.gone(sources["key"].drop_null()))
        known = (row for batch in sources.to_batches(BATCH) for row in batch.to_pylist())
        there = (is_known for batch in pc.is_valid(places).chunks for is_known in batch.to_pylist())
        for slide, is_known in zip(slides, there, strict=True):
            row = next(known) if is_known else None
            if row is None or row["key"] in gone:
                yield None
            else:
                yield SlideStatus(slide.slide_id, slide.uri, **outcome({**row, **details.get(row["id"], {})}))

    def _counted(self, sources: pa.Table) -> pa.Table:
        """Sources with the counts of the slides that are there, which may have been made anew since."""
        slides = self.view.slides.select(_COUNTS).take(self.view.slide_places(sources["key"]))
        for name in _COUNTS:
            place = sources.schema.get_field_index(name)
            sources = sources.set_column(place, name, pc.coalesce(slides[name], sources[name]))
        return sources

    def status(self, slide: CohortSlide, version: SourceVersion) -> SlideStatus | None:
        """Of one source; see `statuses`."""
        return next(self.statuses([slide], [version]))

    def slides(self, keys: Sequence[str]) -> Columnar[StoredSlide]:
        """Committed slides.

        Raises:
            StorageError: one is not committed here, or gone.
        """
        self.require(dict.fromkeys(keys), "no committed slide; run the tile stage")
        rows = self.view.slides.drop_columns(["id"]).take(self.view.slide_places(keys))
        return Columnar(rows, _Stored(self.uri, tuple(rows.column_names)))

    def slide(self, key: str) -> StoredSlide:
        """One of them; see `slides`."""
        return self.slides([key])[0]

    def facts(self, key: str) -> Mapping[str, Any]:
        """All that a committed slide's commit says.

        Raises:
            StorageError: it is not committed here, or gone.
        """
        self.require([key], "no committed slide; run the tile stage")
        return dict(self.all_facts([key]))[key]

    def written(self, key: str) -> Mapping[str, Any] | None:
        """What `slide.json` says of a slide with a folder, committed or to be committed now; None without it.

        Raises:
            StorageError: it was cut by another spec.
        """
        facts = self.commit_of(key)
        if facts is None:
            return None
        spec = fingerprint({"schema": SCHEMA_VERSION, "tiling": facts["spec"]})
        if spec != self.spec_fingerprint:
            raise StorageError(
                f"{files.join(self.uri, key)}: its patches were cut by another tiling spec ({spec}), so it was copied "
                "or renamed to here; remove the folder and run again, which tiles the slide anew"
            )
        return facts

    def distrust(self, key: str) -> None:
        """Remove a plan that names patches which cannot be decoded; the next plan of the slide leaves them out."""
        files.write_bytes(self._distrusted(key), b"a patch of this slide cannot be decoded\n")
        self.forget([key])
        delete_folder(files.join(self.uri, key))

    def is_distrusted(self, key: str) -> bool:
        """Whether the slide's patches must be read before they are planned."""
        return files.exists(self._distrusted(key))

    def _distrusted(self, key: str) -> str:
        return files.join(self.uri, UNFINISHED, key, "damaged")


@dataclass(frozen=True)
class _Stored:
    """Makes a slide of its row of the catalogue."""

    uri: str
    names: tuple[str, ...]

    def __call__(self, *values: Any) -> StoredSlide:
        row = dict(zip(self.names, values, strict=True))
        packed = row["pack"] is not None
        uri = files.join(self.uri, PACKS, row["pack"]) if packed else files.join(self.uri, row["key"])
        place = Place.of(row["place"]) if packed else None
        return StoredSlide(uri=uri, key=row["key"], place=place, **stored(row))


def stored_slide(spec_uri: str, facts: Mapping[str, Any]) -> StoredSlide:
    """The slide of a commit that says these facts."""
    row = slide_row(facts)
    return StoredSlide(uri=files.join(spec_uri, facts["key"]), key=facts["key"], **stored(row))
