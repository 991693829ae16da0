"""Quality control of a tiled cohort: what became of every slide, as one HTML page, a CSV table and GeoJSON outlines.

The page needs nothing else and stays below some 10 MB whatever the cohort's size: it shows pictures of at most
`PICTURES` slides and as many quarantined ones, and rows of at most `ROWS`; the CSV table has them all.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from pipeline.bags.sources import patch_store
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.data import TilingConfig
from pipeline.config.recipe import Config
from pipeline.errors import SlideError, StageError
from pipeline.ingest.tiler import quarantined
from pipeline.ingest.versions import look_at
from pipeline.results.quality_pictures import SlidePicture, picture
from pipeline.results.tables import table_csv
from pipeline.slides.reader import square_mpp
from pipeline.storage import files
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.tiling.interchange import file_stems
from pipeline.tiling.tissue import BIN

PICTURES = 36  # slides: about 150 KB each
ROWS = 1000
BINS = 24
THREADS = 16  # they wait on the storage
PAGE_ALONE = frozenset({"picture", "saturations"})  # no columns of the table


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
    """None where artefacts were not looked for (`tiling.artefacts: keep`)."""
    rejected_outside: int = 0
    """Imported places that do not lie wholly on the slide."""
    rejected_twice: int = 0
    """Imported places that were listed before."""
    bad_tiles: int = 0
    key: str | None = None
    picture: str | None = field(default=None, repr=False)
    """A quarantined slide in small, a JPEG in base64; on the page alone."""
    saturations: tuple[int, ...] = field(default=(), repr=False)
    """Px of the slide in small by saturation, in bins of `tissue.BIN`; on the page alone."""

    @property
    def category(self) -> str:
        """The reason's short name."""
        return (self.reason or "").partition(":")[0]


def quality_rows(store: PatchStore, statuses: Sequence[SlideStatus]) -> list[QualityRow]:
    """What the store knows of each slide.

    Raises:
        StorageError: a committed slide is gone.
    """
    shown = heapq.nsmallest(ROWS, range(len(statuses)), key=lambda place: _order(statuses[place]))
    seen = {statuses[place].key for place in shown}
    known = {key: _facts(facts, with_histogram=key in seen) for key, facts in store.all_facts(_keys(statuses))}
    return [_row(status, {} if status.key is None else known[status.key]) for status in statuses]


def _keys(statuses: Iterable[SlideStatus]) -> list[str]:
    return list(dict.fromkeys(status.key for status in statuses if status.key is not None))


def look_up(store: PatchStore, slides: Sequence[CohortSlide], spec: TilingConfig) -> list[QualityRow]:
    """As `quality_rows`, for slides of which some may not be tiled, or cannot be reached.

    Raises:
        StorageError: the store cannot be read.
    """
    versions = look_at(slides, spec)
    found = store.statuses(slides, [None if isinstance(version, SlideError) else version for version in versions])
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


def review(config: Config) -> dict[str, str]:
    """Write the quality page of whatever of the cohort is tiled; URIs by kind.

    Raises:
        StageError: the cohort is of features that another tool has made.
    """
    if config.given_features:
        raise StageError("qc: the cohort's features were made by another tool; there are no pixels to look at")
    store, folder = patch_store(config), files.join(config.storage.root, "reports", f"{config.name}-quality")
    rows = look_up(store, read_cohort(config.cohort.uri).slides, config.tiling)
    write_outlines(store, rows, folder)
    return write_quality(store, rows, folder, config.name, config.tiling.fingerprint(), PICTURES)


def write_quality(
    store: PatchStore, rows: Sequence[QualityRow], folder: str, name: str, fingerprint: str, pictures: int
) -> dict[str, str]:
    """Write `quality.html` and `quality.csv` into a folder; their URIs by kind.

    Args:
        store: where the slides are.
        rows: every slide of the cohort.
        folder: URI.
        name: of the study, for the page's head.
        fingerprint: of the tiling.
        pictures: slides to show at most; each is read from the store.
    """
    outputs = {"quality": files.join(folder, "quality.html"), "quality_table": files.join(folder, "quality.csv")}
    files.write_bytes(outputs["quality_table"], quality_csv(rows))
    files.write_bytes(outputs["quality"], quality_page(store, rows, name, fingerprint, pictures).encode())
    return outputs


def write_outlines(store: PatchStore, rows: Sequence[QualityRow], folder: str) -> None:
    """Write `tissue/<slide id>.geojson` for each tiled slide into a folder."""
    names = file_stems([row.slide_id for row in rows])
    tiled = [row for row in rows if row.key is not None]

    def copy(row: QualityRow, stored: StoredSlide) -> None:
        files.write_bytes(files.join(folder, "tissue", f"{names[row.slide_id]}.geojson"), stored.outline())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, tiled, store.slides([str(row.key) for row in tiled])))


def _order(row: QualityRow | SlideStatus) -> tuple[bool, int, str]:
    """In which the page lists slides: what was refused first, then those with the fewest patches."""
    patches = row.patches if isinstance(row, QualityRow) else row.n_patches
    return row.status == "committed", patches, row.slide_id


def _spoilt(row: QualityRow) -> int:
    return (row.rejected_artefact or 0) + row.bad_tiles


def quality_csv(rows: Sequence[QualityRow]) -> bytes:
    """One row a slide, in the cohort's order."""
    names = [column.name for column in fields(QualityRow) if column.name not in PAGE_ALONE]
    return table_csv(pa.table({name: [getattr(row, name) for row in rows] for name in names}))


def quality_page(
    store: PatchStore, rows: Sequence[QualityRow], name: str, fingerprint: str, pictures: int = PICTURES
) -> str:
    """The HTML page, with pictures of so many slides."""
    committed = [row for row in rows if row.key is not None]
    quarantined = [row for row in rows if row.status == "quarantined"]
    shown = chosen(committed, pictures)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"count": lambda value: f"{value:,}", "percent": lambda value: f"{100 * value:.3g}%"}
    return page.from_string(resources.files("pipeline.results").joinpath("quality.html").read_text("utf-8")).render(
        name=name,
        fingerprint=fingerprint,
        rows=heapq.nsmallest(ROWS, rows, key=_order),
        total=len(rows),
        committed=committed,
        quarantined=quarantined[:ROWS],
        seen=[row.slide_id for row in quarantined if row.picture is not None][:PICTURES],
        n_quarantined=len(quarantined),
        reasons=Counter(row.category for row in quarantined).most_common(),
        bin_width=BIN,
        imported=any(row.rejected_outside or row.rejected_twice for row in rows),
        absent=sum(row.status == "absent" for row in rows),
        scanners=_scanners(committed),
        histogram=_histogram([row.patches for row in committed]),
        pictures=_pictures(store, shown),
        limit=PICTURES,
    )


def chosen(rows: Sequence[QualityRow], pictures: int = PICTURES) -> list[QualityRow]:
    """At most so many slides to show, those to look at first: a third with the fewest patches, then up to as many with
    the most artefacts or bad tiles, then from the rest evenly by patch count.
    """
    third = pictures // 3
    left = sorted(rows, key=lambda row: (row.patches, row.slide_id))
    picked, left = left[:third], left[third:]
    spoilt = sorted(left, key=lambda row: (-_spoilt(row), row.slide_id))[:third]
    spoilt = [row for row in spoilt if _spoilt(row)]
    left = [row for row in left if row not in spoilt]
    room = pictures - len(picked) - len(spoilt)
    if len(left) > room:
        left = [left[round(place * (len(left) - 1) / max(1, room - 1))] for place in range(room)]
    return [*picked, *spoilt, *left]


def _row(status: SlideStatus, known: Mapping[str, Any]) -> QualityRow:
    return QualityRow(
        slide_id=status.slide_id,
        uri=status.uri,
        status=status.status,
        reason=status.reason,
        patches=status.n_patches,
        bad_tiles=status.n_bad_tiles,
        key=status.key,
        picture=status.picture,
        **known,
    )


def _facts(facts: Mapping[str, Any], *, with_histogram: bool) -> dict[str, Any]:
    width, height = facts["dimensions"]
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
        # a reason without a column is an error: with the patches and the bad tiles they are all places there were
        "rejected_artefact": None if facts["spec"]["artefacts"] == "keep" else 0,
        **{f"rejected_{reason}": count for reason, count in facts["rejects"].items() if reason != "bad-tile"},
    }


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


def _scanners(rows: Sequence[QualityRow]) -> list[dict[str, Any]]:
    """Slides and patches of each scanner, mpp (to a hundredth) and source of it, most slides first."""
    groups: dict[tuple[str, str, str], list[QualityRow]] = {}
    for row in rows:
        mpp = "as it is" if row.mpp is None else f"{row.mpp:.2f}"
        groups.setdefault((str(row.scanner), mpp, str(row.mpp_source)), []).append(row)
    return [
        {"scanner": name, "mpp": mpp, "source": source, "slides": len(those), "patches": sum(r.patches for r in those)}
        for (name, mpp, source), those in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _histogram(counts: Sequence[int]) -> dict[str, Any] | None:
    """Slides in each of some ranges of equal width of patches; None without slides."""
    if not counts:
        return None
    low, high = min(counts), max(counts)
    bins = min(BINS, high - low + 1)
    tallies = [0] * bins
    for count in counts:
        tallies[min(bins - 1, (count - low) * bins // (high - low + 1))] += 1
    ordered = sorted(counts)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"low": low, "high": high, "median": middle, "highest": max(tallies), "tallies": tallies}


def _pictures(store: PatchStore, rows: Sequence[QualityRow]) -> list[tuple[QualityRow, SlidePicture]]:
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(picture, store.slides([str(row.key) for row in rows]))
        return list(zip(rows, found, strict=True))
