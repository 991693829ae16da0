"""A cohort of 200 slides tiled on Ray, its job killed three times and started again: nothing lost, nothing twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.ingest.tiler import store_slide
from pipeline.store.shelf import Shelf
from pipeline.store.verify import verify_store
from tests.pipeline.tiled import SPEC, row, what_is_stored
from tests.synth import cut, tissue_rgb, write_pyramid

SLIDES = 200
BAD = {17: "blank", 58: "text", 99: "empty", 140: "cut"}
TWIN = 120  # of slide 119

JOB = """
import sys
from pathlib import Path
from pipeline.cluster import connected
from pipeline.config.recipe import ClusterConfig
from pipeline.ingest.graph import tile_cohort
from tests.pipeline.tiled import SPEC, row
folder, store = map(Path, sys.argv[1:])
slides = [row(path) for path in sorted(folder.iterdir())]
with connected(ClusterConfig()):
    print("started", flush=True)
    statuses = tile_cohort(slides, SPEC, str(store), cpus=1, on_status=lambda status: None)
print(*(f"{s.slide_id}:{s.status}:{(s.reason or '').partition(':')[0]}" for s in statuses))
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for number in range(SLIDES):
        path, rgb = folder / f"{number:03}.tiff", tissue_rgb(307 + number % 7, 263, seed=number)
        match BAD.get(number):
            case "blank":
                write_pyramid(path, rgb * 0 + 244, levels=1)
            case "text":
                path.write_text("not a slide")
            case "empty":
                path.touch()
            case "cut":
                write_pyramid(path, rgb, levels=1)
                cut(path, 0.7)
            case None:
                write_pyramid(path, rgb, levels=1)
    shutil.copy(folder / f"{TWIN - 1:03}.tiff", folder / f"{TWIN:03}.tiff")
    return folder


def start(cohort: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOB, str(cohort), str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(store: Path) -> dict[str, Path]:
    """Slide -> the pack that it was committed in."""
    shelves = (Shelf(str(place.parent)) for place in store.rglob("catalogue"))
    return {row["key"]: row["pack"] for shelf in shelves for row in shelf.view.slides.to_pylist()}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_job_killed_three_times_ends_as_one_that_was_not(cohort: Path, tmp_path: Path) -> None:
    store, before = tmp_path / "store", dict[str, Path]()
    for wanted in (20, 75, 130):
        with start(cohort, store) as job:
            while job.poll() is None and len(committed(store)) < wanted:
                time.sleep(0.01)
            job.send_signal(signal.SIGKILL)
        assert job.returncode == -signal.SIGKILL, "the job ended before it could be killed"
        before = committed(store)
    with start(cohort, store) as job:
        out, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    statuses = [word.split(":") for word in out.splitlines()[-1].split()]
    assert [name for name, _, _ in statuses] == [f"{number:03}" for number in range(SLIDES)]
    reasons = {int(name): reason for name, status, reason in statuses if status == "quarantined"}
    assert reasons == {17: "no-tissue", 58: "not-a-slide", 99: "empty-file", 140: "truncated"}
    after = committed(store)
    assert len(after) == SLIDES - len(BAD) - 1
    assert {key: after[key] for key in before} == before  # what was committed stayed as it was
    assert verify_store(str(store), 2, lambda done, total: None).damage == []
    for path in sorted(cohort.iterdir()):
        store_slide(row(path), SPEC, str(tmp_path / "undisturbed"))
    found, undisturbed = what_is_stored(store), what_is_stored(tmp_path / "undisturbed")
    sources = {name for name in undisturbed if name.endswith("/sources")}
    assert {name: found[name] for name in found if name not in sources} == {
        name: undisturbed[name] for name in undisturbed if name not in sources
    }
