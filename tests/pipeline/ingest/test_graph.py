"""The tile stage: every slide gets a status, nothing is done twice, a bad slide costs that slide."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.config.tissue import TissueModelConfig
from pipeline.errors import StorageError
from pipeline.ingest import graph
from pipeline.ingest.balance import SLIDE_BYTES
from pipeline.ingest.graph import tile_cohort
from pipeline.ingest.tiler import LargeSlide, begin_slide, store_slide
from pipeline.storage import files
from pipeline.store.patches import SlideStatus
from tests.bench.canvas import repeat, write_canvas
from tests.pipeline.tiled import RGB, SPEC, row, small_tasks, spoilt, what_is_stored
from tests.s3 import serve_s3
from tests.synth import tissue_rgb, write_pyramid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


def tile(slides: list[CohortSlide], store: Path, spec: TilingConfig = SPEC) -> Sequence[SlideStatus]:
    seen: list[SlideStatus] = []
    statuses = tile_cohort(slides, spec, str(store), cpus=1, on_status=seen.append)
    assert sorted(s.slide_id for s in seen) == sorted(slide.slide_id for slide in slides)
    assert [s.slide_id for s in statuses] == [slide.slide_id for slide in slides]
    return statuses


def kill_a_tiler(store: Path, ended: threading.Event) -> bool:
    """Kills the first Ray worker seen at work after two groups are committed; False if the stage ended before."""
    while not ended.wait(0.002):
        if len(list(store.glob("*/catalogue/*"))) < 2:
            continue
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "_tile_task" in " ".join(process.cmdline()):
                    process.kill()
                    return True
    return False


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "good.tiff", RGB, levels=2)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.ray
def test_a_mended_slide_is_tiled_again(good: Path, tmp_path: Path, store: Path, ray_session: None) -> None:
    path = spoilt("text", good, tmp_path)
    assert tile([row(path)], store)[0].status == "quarantined"
    shutil.copy(good, path)
    assert tile([row(path)], store)[0].status == "committed"


def test_slides_and_store_on_s3(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        bucket, uri = server.bucket("slides"), "s3://slides/a b/good.tiff"
        files.write_bytes(uri, good.read_bytes())
        slides = [CohortSlide(name, f"{bucket}/a b/{name}.tiff", name, None, None, {}, {}) for name in ("good", "none")]
        remote, missing = (store_slide(slide, SPEC, f"{bucket}/store") for slide in slides)
        assert (remote.status, (missing.reason or "")[:9]) == ("committed", "missing: ")
        local = store_slide(row(good), SPEC, str(tmp_path / "store"))
        assert remote.key == local.key is not None
        mirror = tmp_path / "s3" / "slides" / "store"
        for path in (tmp_path / "store").glob("*/*/*"):
            if path.parent.name != "catalogue":
                assert path.read_bytes() == (mirror / path.relative_to(tmp_path / "store")).read_bytes()
        assert tile_cohort(slides[:1], SPEC, f"{bucket}/store", cpus=1, on_status=print) == [remote]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError, match="no slide can be reached"):
            tile_cohort(slides[:1], SPEC, str(tmp_path / "other"), cpus=1, on_status=print)


@pytest.mark.ray
def test_a_cohort_on_ray(good: Path, tmp_path: Path, store: Path, ray_session: None) -> None:
    other = write_pyramid(tmp_path / "other.tiff", tissue_rgb(613, 487, seed=3), levels=2)
    twin = Path(shutil.copy(good, tmp_path / "twin.tiff"))
    slides = [row(spoilt("blank", good, tmp_path)), row(good), row(tmp_path / "gone.tiff"), row(other), row(twin)]
    statuses = tile(slides, store)
    assert [s.status for s in statuses] == ["quarantined", "committed", "quarantined", "committed", "committed"]
    assert statuses[1].key == statuses[4].key != statuses[3].key
    assert len(what_is_stored(store)) == 2 + 1
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    shutil.copy(good, tmp_path / "gone.tiff")  # what was missing is there now: only that one is done
    again = tile(slides, store)
    assert again[2].status == "committed"
    assert [s for i, s in enumerate(again) if i != 2] == [s for i, s in enumerate(statuses) if i != 2]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_little_work_is_done_without_ray_and_gives_the_same(
    good: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_pyramid(tmp_path / "other.tiff", tissue_rgb(613, 487, seed=3), levels=2)
    slides = [row(spoilt("blank", good, tmp_path)), row(good), row(tmp_path / "gone.tiff"), row(other)]

    def started() -> None:
        raise AssertionError("Ray")

    def tiled(some: list[CohortSlide], into: Path) -> Sequence[SlideStatus]:
        return tile_cohort(some, SPEC, str(into), cpus=1, on_status=lambda _: None, start=started, here=True)

    statuses = tiled(slides, store)
    alone = [store_slide(slide, SPEC, str(tmp_path / "alone")) for slide in slides]
    assert [(s.status, s.key, s.reason) for s in statuses] == [(s.status, s.key, s.reason) for s in alone]
    assert what_is_stored(store) == what_is_stored(tmp_path / "alone")
    assert len(list(store.glob("*/catalogue/*"))) == 1  # committed together
    with monkeypatch.context() as slow:
        slow.setattr(graph, "TOLD_S", -1.0)
        tiled(slides, tmp_path / "slow")
        assert len(list((tmp_path / "slow").glob("*/catalogue/*"))) == 3  # each that is there, once it is done
        assert what_is_stored(tmp_path / "slow") == what_is_stored(store)
        small_tasks(slow.setattr)
        begun = begin_slide(row(good), SPEC, str(tmp_path / "large"), whole=False)
        assert isinstance(begun, LargeSlide)
        slow.setattr(graph, "read_slide", lambda *_, **__: (begun, []))
        with pytest.raises(AssertionError, match="Ray"):
            tiled([row(good)], tmp_path / "large")
    kept = {"uri": "/n.pt", "sha256": "0" * 64, "mpp": 2.0, "classes": ["no", "yes"], "tissue": ["yes"]}
    network = SPEC.model_copy(update={"tissue": "model", "tissue_model": TissueModelConfig.model_validate(kept)})
    monkeypatch.setattr(graph, "check_network", lambda *_: None)
    with pytest.raises(AssertionError, match="Ray"):  # minutes a slide, whatever its bytes
        tile_cohort(slides, network, str(store), cpus=1, on_status=print, start=started, here=True)
    monkeypatch.setattr(graph, "LITTLE", sum(Path(s.uri).stat().st_size for s in slides[:2]) + 2 * SLIDE_BYTES - 1)
    assert tiled(slides, store) == statuses  # nothing is fresh
    with pytest.raises(AssertionError, match="Ray"):
        tiled(slides[:2], tmp_path / "more")


def test_large_slides_are_committed_together(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tasks(monkeypatch.setattr)
    paths = [write_pyramid(tmp_path / f"{seed}.tiff", tissue_rgb(613, 487, seed=seed), levels=2) for seed in range(3)]
    begun = {number: begin_slide(row(path), SPEC, str(store), whole=False) for number, path in enumerate(paths)}
    large = {number: slide for number, slide in begun.items() if isinstance(slide, LargeSlide)}
    assert len(large) == 3
    for together, names in ((2, 2), (64, 3)):  # those of the first round are found, and recorded again
        monkeypatch.setattr(graph, "TOGETHER", together)
        job = graph._Job("run", SPEC, str(store), 1, True, lambda: np.empty(0, "S32"), here=True)
        statuses = dict(graph._tile_large(large, job))
        assert [statuses[number].status for number in range(3)] == ["committed"] * 3
        assert len(list(store.glob("*/catalogue/*"))) == names
    assert {row(path).slide_id for path in paths} == {status.slide_id for status in statuses.values()}


@pytest.mark.ray
def test_a_failing_store_fails_the_stage(good: Path, tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="store"):
        tile([row(good)], tmp_path / "file" / "store")


@pytest.mark.ray
def test_real_slides(shared_slides: Path, store: Path, ray_session: None) -> None:
    names = ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "unreadable.svs", "unopenable.tiff"]
    slides = [row(shared_slides / name, 0.5 if name.startswith("TCGA") else None) for name in names]
    statuses = tile(slides, store, TilingConfig())
    assert [s.status for s in statuses] == ["committed", "committed", "quarantined", "quarantined"]
    assert [(s.reason or "").partition(":")[0] for s in statuses] == ["", "", "unreadable", "unopenable"]
    assert statuses[0].n_patches > 30
    assert statuses[1].n_patches > 120


KILLED = """
import os, pickle, signal, sys
from pipeline.ingest import graph
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.storage.files import SourceVersion
graph.read_slide = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
work = [(7, CohortSlide("s", "/data/s.svs", "p", None, None, {}, {}), SourceVersion(1, None, 1.0))]
job = graph._Job("run", TilingConfig(), "store", 1, True, list)
rows = graph._tile_task({"item": pickle.dumps(work)}, graph._grouped, job)
status = pickle.loads(next(rows)["outcome"])
print(status.status, status.reason)
"""


def test_a_slide_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", KILLED], {**os.environ, "TMPDIR": str(tmp_path)}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=False) for _ in range(4)]
    assert [run.returncode for run in runs] == [-9, -9, -9, 0], runs[-1].stderr
    assert runs[-1].stdout.startswith("quarantined crash: /data/s.svs: its process was killed 3 times")
    assert "where memory runs out; raise tiling.cpus" in runs[-1].stdout
    assert not list(tmp_path.iterdir())


FULL = """
import pickle, sys, tempfile
from pathlib import Path
from pipeline.ingest import graph
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import NodeError
folder, slide, store = sys.argv[1:]
tempfile.tempdir = folder
with Path(folder, "fill").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        print(error.strerror)
from pipeline.storage.files import source_version
work = [(0, CohortSlide("s", slide, "p", None, None, {}, {}), source_version(slide))]
job = graph._Job("run", TilingConfig(patch_px=64, mpp=None), store, 1, True, list)
(row,) = graph._tile_task({"item": pickle.dumps(work)}, graph._grouped, job)
assert row["failure"] is not None, row
error = pickle.loads(row["failure"])
assert isinstance(error, NodeError)
assert not any(file.stat().st_size for file in Path(tempfile.gettempdir()).glob("ips-task-run-*"))  # it was not killed
print(error)
"""


@pytest.mark.parametrize("what", ["temporary files", "copies of slides"])
def test_a_full_disk_of_a_node_is_the_nodes_fault_and_names_the_folder(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own: 64 KiB of memory as a disk, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces")
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    Image.fromarray(RGB).save(tmp_path / "s3" / "bucket" / "slide.tiff")  # not of tiles: only a copy can be opened
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        script, slide, store = FULL, str(tmp_path / "s3" / "bucket" / "slide.tiff"), str(tmp_path / "store")
        if what == "copies of slides":
            script = FULL.replace("tempfile.tempdir = folder\n", "").replace("mpp=None", "mpp=None, cache=folder")
            slide = "s3://bucket/slide.tiff"
        command = [sys.executable, "-c", script, str(disk), slide, store]
        run = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    full, said = done.stdout.splitlines()
    assert full == "No space left on device"
    assert str(disk) in said
    assert "No space left on device" in said
    assert {"temporary files": "TMPDIR", "copies of slides": "tiling.cache"}[what] in said
    assert not list(tmp_path.glob("store/*/*"))  # no slide is said to be bad


NO_RAY = """
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.ingest import graph
from pipeline.ingest.balance import SLIDE_BYTES
from pipeline.ingest.graph import tile_cohort
from pipeline.ingest.tiler import store_slide
path, store = sys.argv[1:]
spec = TilingConfig(patch_px=64, min_tissue=0.4)
slide = CohortSlide("good", path, "good", None, None, {}, {})
store_slide(slide, spec, store)
statuses = tile_cohort([slide], spec, store, cpus=1, on_status=lambda status: None)
assert statuses[0].status == "committed"
print(sorted(name for name in ("ray", "torch", "mlflow") if name in sys.modules))
"""


def test_tiling_loads_no_torch_and_a_complete_store_no_ray(good: Path, store: Path) -> None:
    command = [sys.executable, "-c", NO_RAY, str(good), str(store)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
    meta = [sys.executable, "-c", "import sys; sys.modules['torch'] = sys\n" + NO_RAY, str(good), str(store)]
    assert "torch" in subprocess.run(meta, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.ray
@pytest.mark.slow
def test_two_tasks_share_a_slide_of_13824_patches(
    shared_slides: Path,
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twice in the cohort, beside a small one; the store is the one that a single task writes. Its patches show."""
    monkeypatch.setattr("pipeline.progress._FIRST_S", 0)
    monkeypatch.setattr("pipeline.progress._GROWTH", 0)
    caplog.set_level("INFO", "pipeline.progress")
    canvas = write_canvas(tmp_path / "canvas.tiff")
    large = repeat(canvas, tmp_path / "large.tiff", 3, 2)
    twin = Path(shutil.copy(large, tmp_path / "twin.tiff"))
    spec = TilingConfig(tissue="none")
    slides = [row(large), row(twin), row(shared_slides / "CMU-1-Small-Region.svs")]
    statuses = tile(slides, tmp_path / "store", spec)
    assert [status.status for status in statuses] == ["committed"] * 3, statuses
    assert statuses[0].key == statuses[1].key
    assert statuses[0].n_patches == 13_824
    shown = [line.partition(" patches of large slides, ")[0] for line in caplog.messages if "large slides" in line]
    assert shown == [f"tile: {count:,}/27,648" for count in (6912, 13_824, 20_736, 27_648)]
    assert isinstance(begin_slide(slides[0], spec, str(tmp_path / "other"), whole=False), LargeSlide)
    for slide in slides:
        store_slide(slide, spec, str(tmp_path / "whole"))
    assert what_is_stored(tmp_path / "store") == what_is_stored(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_worker_killed_mid_slide_costs_nothing(tmp_path: Path, ray_session: None) -> None:
    slides = []
    for number in range(12):
        path = write_pyramid(tmp_path / f"{number}.tiff", tissue_rgb(1511, 1213, seed=number), levels=1)
        slides.append(row(path))
    spec = SPEC.model_copy(update={"patch_px": 32})
    for attempt in range(10):  # a busy machine may let the stage end before the kill
        store = tmp_path / f"store{attempt}"
        ended = threading.Event()
        with ThreadPoolExecutor() as pool:
            killed = pool.submit(kill_a_tiler, store, ended)
            try:
                statuses = tile(slides, store, spec)
            finally:
                ended.set()
        assert [status.status for status in statuses] == ["committed"] * 12, statuses
        if killed.result():
            break
    assert killed.result()
    for slide in slides:
        store_slide(slide, spec, str(tmp_path / "undisturbed"))
    assert what_is_stored(store) == what_is_stored(tmp_path / "undisturbed")
