"""Quality control of a tiled cohort: what became of every slide, as one HTML page, a CSV table and GeoJSON outlines.

The page needs nothing else and stays below some 10 MB whatever the cohort's size: it shows pictures of at most
`PICTURES` slides and as many quarantined ones, and rows of at most `ROWS`; the CSV table has them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bags.sources import patch_store
from pipeline.cohort.table import CohortSlide, read_cohort
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.pages import render_page
from pipeline.results.quality_pictures import SlidePicture, figure, picture
from pipeline.results.quality_rows import ROWS, QualityRow, as_columns_of_rows, listed, look_up, quality_csv
from pipeline.results.quality_sharpness import sharp_groups
from pipeline.storage import files
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.tiling.interchange import file_stems
from pipeline.tiling.sharpness import bin_edge, bin_place
from pipeline.tiling.tissue import BIN

PICTURES = 36  # slides: about 150 KB each
BINS = 24
THREADS = 16  # they wait on the storage


def review(config: Config) -> dict[str, str]:
    """Write the quality page of whatever of the cohort is tiled; URIs by kind.

    Raises:
        StageError: the cohort is of features that another tool has made.
    """
    if config.given_features:
        raise StageError("qc: the cohort's features were made by another tool; there are no pixels to look at")
    store, folder = patch_store(config), files.join(config.storage.root, "reports", f"{config.name}-quality")
    slides = read_cohort(config.cohort.uri).slides
    rows = look_up(store, slides, config.tiling)
    write_outlines(store, rows, folder)
    return write_quality(store, rows, folder, config.name, config.tiling.fingerprint(), PICTURES, slides)


def write_quality(
    store: PatchStore,
    rows: Sequence[QualityRow],
    folder: str,
    name: str,
    fingerprint: str,
    pictures: int,
    slides: Sequence[CohortSlide] = (),
) -> dict[str, str]:
    """Write `quality.html` and `quality.csv` into a folder; their URIs by kind.

    Args:
        store: where the slides are.
        rows: every slide of the cohort.
        folder: URI.
        name: of the study, for the page's head.
        fingerprint: of the tiling.
        pictures: slides to show at most; each is read from the store.
        slides: the cohort's, as `rows`, where it is to be told which of its groups are how sharp.
    """
    outputs = {"quality": files.join(folder, "quality.html"), "quality_table": files.join(folder, "quality.csv")}
    files.write_bytes(outputs["quality_table"], quality_csv(rows))
    files.write_bytes(outputs["quality"], quality_page(store, rows, name, fingerprint, pictures, slides).encode())
    return outputs


def write_outlines(store: PatchStore, rows: Sequence[QualityRow], folder: str) -> None:
    """Write `tissue/<slide id>.geojson` for each tiled slide into a folder."""
    names = file_stems([row.slide_id for row in rows])
    tiled = [row for row in rows if row.key is not None]

    def copy(row: QualityRow, stored: StoredSlide) -> None:
        files.write_bytes(files.join(folder, "tissue", f"{names[row.slide_id]}.geojson"), stored.outline())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, tiled, store.slides([str(row.key) for row in tiled])))


def quality_page(
    store: PatchStore,
    rows: Sequence[QualityRow],
    name: str,
    fingerprint: str,
    pictures: int = PICTURES,
    slides: Sequence[CohortSlide] = (),
) -> str:
    """The HTML page, with pictures of so many slides."""
    held = as_columns_of_rows(rows)
    committed = held.filter(pc.is_valid(held.table["key"]))
    quarantined = held.filter(pc.equal(held.table["status"], "quarantined"))
    imported = pc.max(pc.add(held.table["rejected_outside"], held.table["rejected_twice"])).as_py()
    return render_page(
        "results/quality.html",
        {"count": lambda value: f"{value:,}", "percent": lambda value: f"{100 * value:.3g}%", "figure": figure},
        name=name,
        fingerprint=fingerprint,
        rows=[held[place] for place in listed(held.table).to_pylist()],
        total=len(held),
        tiled=_totals(committed.table),
        quarantined=list(quarantined[:ROWS]),
        seen=quarantined.filter(pc.is_valid(quarantined.table["picture"])).table["slide_id"][:PICTURES].to_pylist(),
        n_quarantined=len(quarantined),
        reasons=Counter(row.category for row in quarantined).most_common(),
        bin_width=BIN,
        imported=bool(imported),
        absent=pc.sum(pc.equal(held.table["status"], "absent")).as_py(),
        scanners=_scanners(committed.table),
        sharp=sharp_groups(held.table, slides),
        bin_edge=bin_edge,
        bin_place=bin_place,
        histogram=_histogram(committed.table["patches"].to_numpy()),
        pictures=_pictures(store, chosen(committed, pictures)),
        limit=PICTURES,
    )


def _totals(tiled: pa.Table) -> dict[str, Any]:
    """Of the tiled slides."""
    beyond = pc.filter(tiled["tissue_beyond"], pc.greater(tiled["tissue_beyond"], 0))
    known = tiled["rejected_artefact"].null_count == 0
    return {
        "slides": len(tiled),
        "patches": pc.sum(tiled["patches"]).as_py() or 0,
        "bad_tiles": pc.sum(tiled["bad_tiles"]).as_py() or 0,
        "artefacts": (pc.sum(tiled["rejected_artefact"]).as_py() or 0) if known else None,
        "blurred": pc.sum(tiled["rejected_blurred"]).as_py(),
        "beyond": len(beyond),
        "most_beyond": pc.max(beyond).as_py(),
    }


def chosen(rows: Sequence[QualityRow], pictures: int = PICTURES) -> list[QualityRow]:
    """At most so many slides to show, those to look at first: a third with the fewest patches, then up to as many with
    the most artefacts, blurred patches or bad tiles, up to half as many of the least sharp, then from the rest evenly
    by patch count.
    """
    held = as_columns_of_rows(rows)
    third = pictures // 3
    left = _sorted(held.table, patches="ascending")
    picked, left = left[:third], left[third:]
    blurred = pc.add(pc.fill_null(held.table["rejected_blurred"], 0), held.table["bad_tiles"])
    spoilt = pc.add(pc.fill_null(held.table["rejected_artefact"], 0), blurred)
    table = pa.table({"spoilt": spoilt, "slide_id": held.table["slide_id"]}).take(left)
    worst = left[_sorted(table, spoilt="descending")[: min(third, pc.sum(pc.greater(table["spoilt"], 0)).as_py() or 0)]]
    left = left[~np.isin(left, worst)]
    medians = held.table["sharpness"].to_numpy().astype(np.float64)[left]  # NaN where it was not measured
    dull = np.argsort(medians, kind="stable")[: min(third // 2, np.isfinite(medians).sum())]
    worst, left = np.concatenate([worst, left[dull]]), np.delete(left, dull)
    room = pictures - len(picked) - len(worst)
    if len(left) > room:
        left = left[[round(place * (len(left) - 1) / max(1, room - 1)) for place in range(room)]]
    return [held[place] for place in np.concatenate([picked, worst, left]).tolist()]


def _sorted(table: pa.Table, **by: str) -> npt.NDArray[np.uint64]:
    """Places of the rows by a column, then by the slides' ids."""
    found: npt.NDArray[np.uint64] = pc.sort_indices(table, [*by.items(), ("slide_id", "ascending")]).to_numpy()
    return found


def _scanners(tiled: pa.Table) -> list[dict[str, Any]]:
    """Slides and patches of each scanner, mpp (to a hundredth) and source of it, most slides first."""
    grouped = tiled.group_by(["scanner", "mpp", "mpp_source"]).aggregate([("patches", "count"), ("patches", "sum")])
    slides, patches = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for row in grouped.to_pylist():
        mpp = "as it is" if row["mpp"] is None else f"{row['mpp']:.2f}"
        group = str(row["scanner"]), mpp, str(row["mpp_source"])
        slides[group] += row["patches_count"]
        patches[group] += row["patches_sum"]
    return [
        {"scanner": group[0], "mpp": group[1], "source": group[2], "slides": count, "patches": patches[group]}
        for group, count in sorted(slides.items(), key=lambda item: (-item[1], item[0]))
    ]


def _histogram(counts: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """Slides in each of some ranges of equal width of patches; None without slides."""
    if not len(counts):
        return None
    low, high = int(counts.min()), int(counts.max())
    bins = min(BINS, high - low + 1)
    tallies = np.bincount((counts - low) * bins // (high - low + 1), minlength=bins).tolist()
    return {"low": low, "high": high, "median": float(np.median(counts)), "highest": max(tallies), "tallies": tallies}


def _pictures(store: PatchStore, rows: Sequence[QualityRow]) -> list[tuple[QualityRow, SlidePicture]]:
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(picture, store.slides([str(row.key) for row in rows]))
        return list(zip(rows, found, strict=True))
