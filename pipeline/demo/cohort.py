"""The synthetic cohort: slides with two questions (`picture`).

`label`: are there lesions? Half of the slides have some, and each patch that shows one answers it. `burden`: do they
cover more than 6% of the tissue? They cover 9% to 11.5% in a quarter of the slides and 3.5% to 4.5% in another, both on
more patches than the demo's network selects: only all patches together tell.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config.data import DemoConfig
from pipeline.demo.picture import SITES, Extent, draw_slide
from pipeline.demo.tiff import write_pyramid
from pipeline.errors import StorageError
from pipeline.storage.files import join, write_bytes

MPP = 0.5
SPLITS = ("train", "test", "train", "val", "train", "train", "test", "train")  # of patients, in turn
BURDEN = 0.06  # share of the tissue; no slide lies between 5.1% and 8.4%


@dataclass(frozen=True)
class DemoSlide:
    """One row of the cohort; `number` seeds its picture."""

    number: int
    patient_id: str
    site: str
    split: str
    extent: Extent

    @property
    def label(self) -> int:
        """Whether it has lesions."""
        return int(self.extent > Extent.NONE)

    @property
    def burden(self) -> int:
        """Whether they cover more than `BURDEN` of its tissue."""
        return int(self.extent is Extent.MANY)

    @property
    def slide_id(self) -> str:
        """Name of the slide."""
        return f"demo-{self.number:04d}"

    @property
    def uri(self) -> str:
        """Its file, relative to the cohort's."""
        return f"slides/{self.slide_id}.tif"


def write_demo(folder: str, config: DemoConfig, on_progress: Callable[[int, int], None] | None = None) -> str:
    """Write `<folder>/slides/*.tif` and, last, `<folder>/cohort.csv`; returns the URI of the latter.

    The folder is local; equal configs give equal bytes. `on_progress(done, total)` is called after each slide.
    Raises StorageError when the folder cannot be written.
    """
    cohort = plan_cohort(config)
    try:
        Path(folder, "slides").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error}); name a folder that can be written") from error
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_write_slide, folder, slide, config.seed) for slide in cohort]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                if on_progress is not None:
                    on_progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("slide_id", "uri", "patient_id", "site", "split", "label", "burden"))
    table.writerows((s.slide_id, s.uri, s.patient_id, s.site, s.split, s.label, s.burden) for s in cohort)
    uri = join(folder, "cohort.csv")
    write_bytes(uri, text.getvalue().encode())
    return uri


def plan_cohort(config: DemoConfig) -> list[DemoSlide]:
    """Who is in the cohort: patients with one slide or two in turn, one extent of lesions a patient.

    Half of the slides have none, a quarter few, a quarter many. Sites and splits go round within each extent, so that
    they say nothing about it and every test has all three; the order of slides and of patients is shuffled by the seed.
    """
    half = config.slides // 2
    counts = {Extent.NONE: config.slides - half, Extent.FEW: half - half // 2, Extent.MANY: half // 2}
    owners: list[int] = []  # of each slide
    extents: list[Extent] = []  # of each patient
    for extent, left in counts.items():
        while left:
            count = min(1 + len(extents) % 2, left)
            owners += [len(extents)] * count
            extents.append(extent)
            left -= count
    rng = np.random.default_rng((config.seed, 0))
    names, order = rng.permutation(len(extents)), rng.permutation(len(owners))
    nth = [extents[:patient].count(extent) for patient, extent in enumerate(extents)]  # within the extent
    return [
        DemoSlide(
            number,
            f"P{names[owner]:04d}",
            SITES[nth[owner] % len(SITES)],
            SPLITS[nth[owner] % len(SPLITS)],
            extents[owner],
        )
        for number, owner in enumerate(owners[row] for row in order)
    ]


def _write_slide(folder: str, slide: DemoSlide, seed: int) -> None:
    picture = draw_slide((seed, 1, slide.number), slide.extent, SITES.index(slide.site))
    write_pyramid(Path(folder, slide.uri), picture.rgbx, MPP)
