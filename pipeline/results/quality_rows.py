"""What is known of every slide of a tiled cohort: rows for the quality page and its table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.columnar import Columnar
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError, StorageError
from pipeline.ingest.statuses import as_columns
from pipeline.ingest.tiler import quarantined
from pipeline.ingest.versions import known, look_at
from pipeline.results.tables import table_csv
from pipeline.slides.reader import square_mpp
from pipeline.storage import files
from pipeline.store.patches import PatchStore, SlideStatus

ROWS = 1000
"""That the page shows."""


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One slide of the cohort; a row of the CSV table."""

    slide_id: str
    uri: str
    status: str
    """committed, quarantined, or absent (not tiled yet)."""
    reason: str | None
    scanner: str | None = None
    """Vendor of the file format."""
    image: str | None = None
    """Which of a file's images it is, and which plane of a stack; None of the first in a file and of one plane."""
    mpp: float | None = None
    """Microns per level-0 px that it was tiled with."""
    mpp_source: str | None = None
    """file, cohort or config (the cohort's override or the config's default), or none (level 0 as it is)."""
    width: int | None = None
    """Level-0 px."""
    height: int | None = None
    level: int | None = None
    """Pyramid level that was read."""
    patches: int = 0
    tissue: float | None = None
    """Share of the slide."""
    tissue_threshold: float | None = None
    """Saturation above which a px is tissue, of 255; None where it was not looked for."""
    tissue_beyond: float | None = None
    """Share of the tissue beyond the last patches; None for imported ones."""
    rejected_tissue: int = 0
    """Places with too little tissue."""
    rejected_artefact: int | None = 0
    """None where artefacts were not looked for (`tiling.artefacts: keep`, or a network that finds the tissue)."""
    rejected_outside: int = 0
    """Imported places that do not lie wholly on the slide."""
    rejected_twice: int = 0
    """Imported places that were listed before."""
    rejected_blurred: int | None = None
    """Patches that were not sharp enough; None where that was not measured (`tiling.min_sharpness`)."""
    sharpness: float | None = None
    """Median of the patches."""
    bad_tiles: int = 0
    key: str | None = None
    picture: str | None = field(default=None, repr=False)
    """A quarantined slide in small, a JPEG in base64; on the page alone."""
    saturations: tuple[int, ...] = field(default=(), repr=False)
    """Px of the slide in small by saturation, in bins of `tissue.BIN`; on the page alone."""
    sharp: tuple[int, ...] = field(default=(), repr=False)
    """Patches, also those that were left out, by sharpness in the bins of `tiling.sharpness`; on the page alone."""

    @property
    def category(self) -> str:
        """The reason's short name."""
        return (self.reason or "").partition(":")[0]


_COLUMNS = pa.schema(
    [
        ("slide_id", pa.string()),
        ("uri", pa.string()),
        ("status", pa.dictionary(pa.int32(), pa.string())),
        ("reason", pa.string()),
        ("scanner", pa.dictionary(pa.int32(), pa.string())),
        ("image", pa.string()),
        ("mpp", pa.float64()),
        ("mpp_source", pa.dictionary(pa.int32(), pa.string())),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("level", pa.int32()),
        ("patches", pa.int64()),
        ("tissue", pa.float64()),
        ("tissue_threshold", pa.float64()),
        ("tissue_beyond", pa.float64()),
        ("rejected_tissue", pa.int32()),
        ("rejected_artefact", pa.int32()),
        ("rejected_outside", pa.int32()),
        ("rejected_twice", pa.int32()),
        ("rejected_blurred", pa.int32()),
        ("sharpness", pa.float64()),
        ("bad_tiles", pa.int64()),
        ("key", pa.string()),
        ("picture", pa.string()),
        ("saturations", pa.list_(pa.int64())),
        ("sharp", pa.list_(pa.int64())),
    ]
)
"""The fields of a row; the last three are no columns of the table."""
_OF_FACTS = (
    "scanner", "image", "mpp", "mpp_source", "width", "height", "level", "tissue", "tissue_threshold", "tissue_beyond",
    "rejected_tissue", "rejected_artefact", "rejected_outside", "rejected_twice", "rejected_blurred", "sharpness",
    "saturations", "sharp",
)  # fmt: skip
_UNKNOWN = {field.name: field.default for field in fields(QualityRow) if field.name in _OF_FACTS}
_COUNTED = {"rejected_tissue", "rejected_artefact", "rejected_outside", "rejected_twice"}
"""Fields that are 0 of a slide without a commit."""
_OF_STATUS = {"patches": "n_patches", "bad_tiles": "n_bad_tiles"}
"""Fields -> columns of statuses, where these have other names."""


def quality_rows(store: PatchStore, statuses: Sequence[SlideStatus]) -> Columnar[QualityRow]:
    """What the store knows of each slide.

    Raises:
        StorageError: a committed slide is gone.
    """
    table = as_columns(statuses).table
    keys = table["key"]
    places, facts = _known(store, keys, frozenset(keys.take(listed(table, "n_patches")).to_pylist()))
    columns = {name: table[_OF_STATUS.get(name, name)] for name in _COLUMNS.names if name not in _OF_FACTS}
    for name in _OF_FACTS:
        column = facts[name].take(places)
        columns[name] = pc.if_else(pc.is_null(places), 0, column) if name in _COUNTED else column
    return Columnar(pa.table([columns[name] for name in _COLUMNS.names], _COLUMNS.names), _row)


def _known(store: PatchStore, keys: pa.ChunkedArray, seen: Collection[str | None]) -> tuple[pa.ChunkedArray, pa.Table]:
    """What the commits of these slides say, and where in it each of them is; px by saturation of `seen` alone."""
    schema = pa.schema([pa.field("key", pa.string()), *(_COLUMNS.field(name) for name in _OF_FACTS)])

    def cells() -> Iterator[Sequence[object]]:
        for key, facts in store.all_facts(pc.unique(keys.drop_null())):
            row = _UNKNOWN | _facts(facts, with_histogram=key in seen)
            assert len(row) == len(_UNKNOWN), sorted(row)  # a reason without a column
            yield [key, *(row[name] for name in _OF_FACTS)]

    found = Columnar.of(cells(), schema, QualityRow).table
    places = pc.index_in(keys, value_set=found["key"].combine_chunks())
    if gone := keys.filter(pc.and_(pc.is_valid(keys), pc.is_null(places))).to_pylist():
        raise StorageError(f"{files.join(store.uri, gone[0])}: its commit is gone; run again")
    return places, found


def _row(*values: Any) -> QualityRow:
    return QualityRow(*(*values[:-2], tuple(values[-2] or ()), tuple(values[-1] or ())))


def as_columns_of_rows(rows: Sequence[QualityRow]) -> Columnar[QualityRow]:
    """The same in columns, which have the fields' names."""
    if isinstance(rows, Columnar):
        return rows
    return Columnar.of(([getattr(row, name) for name in _COLUMNS.names] for row in rows), _COLUMNS, _row)


def quality_csv(rows: Sequence[QualityRow]) -> bytes:
    """One row a slide, in the cohort's order."""
    return table_csv(as_columns_of_rows(rows).table.select(_COLUMNS.names[:-3]))


def listed(slides: pa.Table, patches: str = "patches") -> pa.Array:
    """Places of those that the page lists, in its order: what was refused first, then those with the fewest patches.

    Args:
        slides: with columns `status`, `slide_id`, and one of how many patches each has.
        patches: what that one is called.
    """
    committed = pc.equal(slides["status"], "committed").cast(pa.int8())
    keyed = pa.table({"committed": committed, "patches": slides[patches], "slide_id": slides["slide_id"]})
    return pc.sort_indices(keyed, sort_keys=[(name, "ascending") for name in keyed.column_names])[:ROWS]


def look_up(store: PatchStore, slides: Sequence[CohortSlide], spec: TilingConfig) -> list[QualityRow]:
    """As `quality_rows`, for slides of which some may not be tiled, or cannot be reached.

    Raises:
        StorageError: the store cannot be read.
    """
    versions = look_at(slides, spec)
    found = store.statuses(slides, known(versions))
    statuses: list[SlideStatus] = []
    absent: dict[int, QualityRow] = {}
    for number, (slide, version, status) in enumerate(zip(slides, versions, found, strict=True)):
        if isinstance(version, SlideError):
            statuses.append(quarantined(slide, version.reason, version))
        elif status is not None:
            statuses.append(status)
        else:
            absent[number] = QualityRow(slide.slide_id, slide.uri, "absent", None)
    rows = iter(quality_rows(store, statuses))
    return [absent.get(number) or next(rows) for number in range(len(slides))]


def _facts(facts: Mapping[str, Any], *, with_histogram: bool) -> dict[str, Any]:
    (width, height), spec = facts["dimensions"], facts["spec"]
    mask = facts["evidence"]["mask"]
    return {
        "scanner": facts["vendor"],
        "image": _image(facts["image"]),
        "mpp": facts["mpp"],
        "mpp_source": _mpp_source(facts["mpp"], facts["stated_mpp"]),
        "width": width,
        "height": height,
        "level": facts["level"],
        "tissue": mask["share"],
        "tissue_threshold": mask.get("threshold"),
        "tissue_beyond": mask["beyond"],
        "saturations": tuple(mask.get("histogram", ())) if with_histogram else (),
        **_sharpness(facts.get("sharpness"), with_histogram=with_histogram),
        # a reason without a column is an error: with the patches and the bad tiles they are all places there were
        "rejected_artefact": None if spec["artefacts"] == "keep" or spec["tissue"] == "model" else 0,
        **{f"rejected_{reason}": count for reason, count in facts["rejects"].items() if reason != "bad-tile"},
    }


def _sharpness(known: Mapping[str, Any] | None, *, with_histogram: bool) -> dict[str, Any]:
    """Of a slide's commit."""
    if known is None:
        return {}
    both = zip_longest(known["kept"], known["blurred"], fillvalue=0) if with_histogram else ()
    return {"sharpness": known["median"], "sharp": tuple(sum(pair) for pair in both)}


def _image(picked: Mapping[str, Any] | None) -> str | None:
    if picked is None or not (picked["named"] or picked["plane"] or picked["series"]):
        return None
    name = f" ({picked['name']})" if picked["name"] else ""
    plane = f", {picked['plane']}" if picked["plane"] else ""
    return f"series {picked['series']}{name}{plane}"


def _mpp_source(mpp: float | None, stated: Sequence[float] | None) -> str:
    """Who said so; where somebody overrode a file whose px are not square, what it says."""
    if mpp is None or stated is None:
        return "none" if mpp is None else "cohort or config"
    x, y = stated
    square = square_mpp((x, y))
    if square is None:
        return f"cohort or config; not square in the file, {x:g} x {y:g}"
    return "file" if mpp == square else "cohort or config"
