"""First tiling of many small images: what one costs a task, packed with others and in a folder of its own.

`python -m tests.bench.packs [IMAGES]`: CPU time of one process without Ray, files, syncs of the disk, bytes kept over
those of the patches, and requests to a counted S3 server. The machine's other work shows in none but the first.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest.child import MALLOC
from pipeline.ingest.group import Group
from pipeline.ingest.tiler import ReadSlide, read_slide, store_slide
from pipeline.store.patches import PatchStore
from tests.faults import faulty_s3
from tests.s3 import serve_s3
from tests.synth import tissue_rgb

EDGE, GROUP, SPEC = 512, 250, TilingConfig(patch_px=256, mpp=None)
BUCKET = "bench"


def images(folder: Path, count: int) -> None:
    """JPEGs cut out of one large piece of tissue, all different."""
    tissue = Image.fromarray(tissue_rgb(3072, 3072, seed=1)[300:2100, 300:1900]).filter(ImageFilter.GaussianBlur(0.7))
    corners = np.random.default_rng(5).integers(0, 1600 - EDGE, (count, 2))
    for number, (x, y) in enumerate(corners.tolist()):
        data = io.BytesIO()
        tissue.crop((x, y, x + EDGE, y + EDGE)).save(data, "JPEG", quality=90)
        (folder / f"{number:06d}.jpg").write_bytes(data.getvalue())


def packed(slides: Sequence[CohortSlide], store: str) -> None:
    """As the tasks of the tile stage."""
    for start in range(0, len(slides), GROUP):
        group = Group(PatchStore(store, SPEC.fingerprint()), np.array([], "S32"))
        for number, slide in enumerate(slides[start : start + GROUP]):
            read, _ = read_slide(slide, 2**16, SPEC, store)
            assert isinstance(read, ReadSlide)
            group.add(number, read)
        assert all(status.key for _, status in group.commit())


def alone(slides: Sequence[CohortSlide], store: str) -> None:
    """Each in a folder."""
    for slide in slides:
        assert store_slide(slide, SPEC, store).key


@contextmanager
def synced() -> Iterator[list[int]]:
    """Descriptors of which the disk was asked to write all; it is not asked."""
    seen: list[int] = []
    original = os.fsync
    os.fsync = seen.append  # type: ignore[assignment]
    try:
        yield seen
    finally:
        os.fsync = original


def main(count: int) -> None:
    """Print the table."""
    print(f"| {count:,} JPEGs of {EDGE} px | CPU ms | files | syncs | kept / patches | S3 requests |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch, serve_s3(Path(scratch, "s3")) as server:
        folder = Path(scratch, "s3", BUCKET)
        server.bucket(BUCKET)
        images(folder, count)
        for work in (alone, packed):
            rows = [CohortSlide(path.stem, str(path), "p", None, None, {}, {}) for path in sorted(folder.glob("*.jpg"))]
            work(rows[:5], f"{scratch}/first")  # libraries load
            store = Path(scratch, work.__name__)
            with synced() as syncs:
                began = time.process_time()
                work(rows, str(store))
                cpu = (time.process_time() - began) / count
            files = [path for path in store.rglob("*") if path.is_file()]
            slides = PatchStore(str(store), SPEC.fingerprint())
            stored = slides.slides(slides.view.slides["key"].to_pylist())
            patches = sum(int(slide.index().length.sum()) for slide in stored)
            kept = sum(path.stat().st_size for path in files) / patches
            with faulty_s3(server.endpoint) as proxy:
                os.environ.update({**server.env, "AWS_ENDPOINT_URL": proxy.endpoint})
                remote = [
                    CohortSlide(row.slide_id, f"s3://{BUCKET}/{row.slide_id}.jpg", "p", None, None, {}, {})
                    for row in rows
                ]
                work(remote[:GROUP], f"s3://{BUCKET}/{work.__name__}")
                asked = len(proxy.seen) / len(remote[:GROUP])
            print(
                f"| {work.__name__} | {1000 * cpu:.1f} | {len(files) / count:.3f} | {len(syncs) / count:.3f} | "
                f"{kept:.2f} | {asked:.2f} |"
            )


if __name__ == "__main__":
    if not MALLOC.keys() <= os.environ.keys():  # as in the processes that read slides
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench.packs", *sys.argv[1:]], {**MALLOC, **os.environ})
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
