"""What goes wrong at night, made to happen: killed workers, full disks, bad networks, slides that change or collide."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import simplejpeg
from PIL import Image

from pipeline.errors import SlideError, StorageError
from pipeline.ingest import tiler
from pipeline.ingest.balance import shares
from pipeline.ingest.tiler import LargeSlide, begin_slide, store_slide
from pipeline.storage import files, s3
from pipeline.storage.ranges import LocalSource
from pipeline.store import commit, parts
from pipeline.store.catalogue import Catalogue
from pipeline.store.parts import part_count
from pipeline.store.patches import PatchStore
from pipeline.store.verify import verify_store
from pipeline.tiling import cutting
from tests.faults import Fault, Faults, faulty_s3
from tests.pipeline.tiled import RGB, SPEC, contents, row, sampled_digests, small_tasks, tile_in_shares
from tests.s3 import S3Server, serve_s3
from tests.synth import tissue_rgb, write_pyramid, zero_tile


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "slide.tiff", RGB, levels=2)


@pytest.fixture(scope="module")
def undisturbed(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store as one task writes it, in small parts."""
    store = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        small_tasks(patch.setattr)
        assert store_slide(row(slide), SPEC, str(store)).status == "committed"
    return contents(store)


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tasks(monkeypatch.setattr)


def findings(store: str) -> list[str]:
    """Damage to a store; none is expected after any fault."""
    return [f"{found.uri}: {found.what}" for found in verify_store(store, 2, lambda done, total: None).damage]


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from tests.pipeline.tiled import row, small_tasks, tile_in_shares
path, folder = sys.argv[1:]
small_tasks(setattr)
tile_in_shares(row(path), folder + "/cold")
started = time.monotonic()
tile_in_shares(row(path), folder + "/warm")
duration = time.monotonic() - started
moments, number, places = random.Random(0), 0, set()
while number < 10 or (len(places) < 3 and number < 60):
    store = f"{folder}/{number}"
    child = os.fork()
    if child == 0:
        tile_in_shares(row(path), store)
        os._exit(0)
    time.sleep(moments.uniform(0, duration))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        duration *= 0.9  # it was faster than the first
        shutil.rmtree(store)
        continue
    left = sum(path.is_file() for path in Path(store).rglob("*"))
    places.add(left)
    print(tile_in_shares(row(path), store).status, left)
    number += 1
"""


@pytest.mark.slow
def test_a_worker_killed_at_ten_random_moments_changes_nothing(
    slide: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(slide), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) >= 10, done.stderr
    assert {line[0] for line in lines} == {"committed"}
    assert len({left for _, left in lines}) >= 3  # files they had written: they died at different places
    for number in range(len(lines)):
        assert contents(tmp_path / str(number)) == undisturbed
        assert findings(str(tmp_path / str(number))) == []


def test_two_jobs_on_one_slide_at_once_end_with_one_store(
    slide: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(3) as pool:
        statuses = list(pool.map(lambda _: tile_in_shares(row(slide), str(tmp_path / "store")), range(3)))
    assert len(set(statuses)) == 1
    assert contents(tmp_path / "store") == undisturbed


def test_a_share_is_not_written_for_a_slide_that_another_job_finished(slide: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    begun = begin_slide(row(slide), SPEC, store, whole=False)
    assert isinstance(begun, LargeSlide)
    store_slide(row(slide), SPEC, store)
    before = contents(tmp_path)
    assert tiler.store_share(begun, range(2), SPEC, store) is None
    assert contents(tmp_path) == before


def test_a_share_reads_the_catalogue_only_where_another_one_gave_the_slide_up(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a thousand large slides are tiled it is hundreds of files."""
    store = str(tmp_path / "store")
    begun = begin_slide(row(slide), SPEC, store, whole=False)
    assert isinstance(begun, LargeSlide)
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "read", lambda *_: pytest.fail("the catalogue was read"))
        assert tiler.store_share(begun, range(2), SPEC, store) is None

    def hopeless(*_: object) -> None:
        raise SlideError("bad-tiles", "every second one")

    with monkeypatch.context() as patch:
        patch.setattr(tiler, "write_share", hopeless)
        status = tiler.store_share(begun, range(2, 4), SPEC, store)
    assert status is not None
    assert status.reason == "bad-tiles: every second one"
    assert tiler.store_share(begun, range(4, 6), SPEC, store) == status
    assert len(list((tmp_path / "store").rglob("part-*.arrow"))) == 2
    assert verify_store(store, 1, lambda *_: None).damage == []


def test_a_slide_replaced_between_its_shares_is_tiled_anew(slide: Path, tmp_path: Path) -> None:
    path, store = Path(shutil.copy(slide, tmp_path / "moving.tiff")), str(tmp_path / "store")
    begun = begin_slide(row(path), SPEC, store, whole=False)
    assert isinstance(begun, LargeSlide)
    assert tiler.store_share(begun, range(2), SPEC, store) is None
    write_pyramid(path, tissue_rgb(613, 487, seed=9), levels=2)
    for share in (tiler.store_share(begun, range(2, 4), SPEC, store), tiler.finish_slide(begun, SPEC, store)):
        assert share is not None
        assert (share.reason or "").startswith("changed: ")
    status = tile_in_shares(row(path), store)
    assert status.status == "committed"
    assert status.key != begun.planned.key
    fresh = store_slide(row(path), SPEC, str(tmp_path / "fresh"))
    name = f"{SPEC.fingerprint()}/{fresh.key}"
    assert contents(tmp_path / "store" / name) == contents(tmp_path / "fresh" / name)


def test_a_large_slide_replaced_between_a_kill_and_the_next_run_shares_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies have in common what the digest samples, and level 1, which the plan is made of."""
    sampled_digests(monkeypatch.setattr)
    monkeypatch.setattr(parts, "MAX_PART_PATCHES", 60)  # 4 parts
    path, store = tmp_path / "slide.tiff", str(tmp_path / "store")
    slide = write_pyramid(tmp_path / "sound.tiff", tissue_rgb(1103, 871), levels=2)
    shutil.copy(slide, path)
    spec = SPEC.model_copy(update={"max_bad_tiles": 0.9, "tissue": "none"})
    zero_tile(path, 0, 7)  # of 20, of which 0, 6, 12 and 19 are sampled
    begun = begin_slide(row(path), spec, store, whole=False)
    assert isinstance(begun, LargeSlide)
    for share in shares(part_count(begun.planned.tiling), 2):  # all but the commit
        assert tiler.store_share(begun, share, spec, store) is None
    shutil.copy(slide, path)
    status = tile_in_shares(row(path), store, spec)
    assert (status.status, status.n_bad_tiles, status.key) == ("committed", 0, begun.planned.key)
    stored, sound = (PatchStore(place, spec.fingerprint()) for place in (store, str(tmp_path / "sound")))
    other = sound.slide(str(tile_in_shares(row(path), str(tmp_path / "sound"), spec).key))
    rows = range(status.n_patches)
    assert stored.slide(str(status.key)).payloads(rows) == other.payloads(rows)
    assert findings(store) == []


def other_codec(patch: pytest.MonkeyPatch) -> None:
    """As another version of the encoder would: other bytes, and another fingerprint."""
    patch.setattr(cutting, "encode", lambda rgb, quality: simplejpeg.encode_jpeg(rgb, quality=quality - 20))
    patch.setattr(commit, "codec_fingerprint", lambda: "other")


def test_jobs_with_two_codecs_on_one_slide_mix_no_parts(
    slide: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Each in turn writes some parts; the slide is one job's, whole, and the other's files stand beside it."""
    store = str(tmp_path / "store")
    one = begin_slide(row(slide), SPEC, store, whole=False)
    assert isinstance(one, LargeSlide)
    first, second = shares(part_count(one.planned.tiling), 2)
    assert tiler.store_share(one, first, SPEC, store) is None
    with pytest.MonkeyPatch.context() as patch:
        other_codec(patch)
        two = begin_slide(row(slide), SPEC, store, whole=False)
        assert isinstance(two, LargeSlide)
        for share in (first, second):
            assert tiler.store_share(two, share, SPEC, store) is None
    assert tiler.store_share(one, second, SPEC, store) is None
    status = tiler.finish_slide(one, SPEC, store)
    assert tiler.finish_slide(two, SPEC, store) == status
    assert status.status == "committed"
    assert findings(store) == []
    kept = {name: data for name, data in contents(tmp_path / "store").items() if name in undisturbed}
    assert kept == undisturbed


def test_a_node_with_another_codec_writes_no_part(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    begun = begin_slide(row(slide), SPEC, store, whole=False)
    assert isinstance(begun, LargeSlide)
    other_codec(monkeypatch)
    status = tiler.store_share(begun, range(2), SPEC, store)
    assert status is not None
    assert (status.reason or "").startswith("codec: this node's image libraries are not those")
    assert not list((tmp_path / "store").rglob("part-*"))
    assert tile_in_shares(row(slide), store).status == "committed"  # it is not remembered


def test_a_slide_replaced_while_a_part_is_read_is_not_recorded(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = Path(shutil.copy(slide, tmp_path / "moving.tiff")), tmp_path / "store"
    original = files.write_bytes

    def replacing(uri: str, data: bytes) -> None:
        original(uri, data)
        if "/part-00001-" in uri and uri.endswith(".arrow"):
            write_pyramid(path, tissue_rgb(613, 487, seed=9), levels=2)

    monkeypatch.setattr(files, "write_bytes", replacing)
    status = tile_in_shares(row(path), str(store))
    assert (status.status, (status.reason or "")[:9]) == ("quarantined", "changed: ")
    assert len(list(store.rglob("part-*.parquet"))) == 1
    assert not list(store.rglob("*.json"))


def test_two_slides_with_one_base_name_are_two(slide: Path, tmp_path: Path) -> None:
    other = write_pyramid(tmp_path / slide.name, tissue_rgb(613, 487, seed=4), levels=2)
    one, two = (store_slide(row(path), SPEC, str(tmp_path / "store")) for path in (slide, other))
    assert one.key != two.key
    again = [PatchStore(str(tmp_path / "store"), SPEC.fingerprint()).slide(str(s.key)).n_patches for s in (one, two)]
    assert again == [one.n_patches, two.n_patches]


NAME = "Präparat 7, 100% [a]?#=+&é 切片.tiff"


@pytest.mark.parametrize("remote", [False, True])
def test_unicode_and_spaces_in_uris(
    *, remote: bool, slide: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "bucket" / "größe 1"
    root.mkdir(parents=True)
    shutil.copy(slide, root / NAME)
    with serve_s3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        base = "s3://bucket/größe 1" if remote else str(root)
        status = tile_in_shares(row(f"{base}/{NAME}"), f"{base}/der Speicher")
        assert status.status == "committed", status.error
        assert findings(f"{base}/der Speicher") == []
    assert same_slides(contents(root / "der Speicher"), undisturbed)


def same_slides(store: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether two stores hold the same slides; their sources lie elsewhere."""
    one, two = ({n: d for n, d in each.items() if "/catalogue/sources" not in n} for each in (store, other))
    return one == two


@pytest.fixture
def behind(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Server, Faults]]:
    """s3://bucket/slide.tiff on a server, and the bad network that this process sees it through."""
    (tmp_path / "bucket").mkdir()
    shutil.copy(slide, tmp_path / "bucket")
    with serve_s3(tmp_path) as server, faulty_s3(server.endpoint) as faults:
        for name, value in {**server.env, "AWS_ENDPOINT_URL": faults.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield server, faults


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["busy", "reset", "short", "silent"])
def test_a_bad_network_costs_time_only(
    fault: Fault,
    behind: tuple[S3Server, Faults],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "READ_S", 0.3)
    _, faults = behind
    faults.every(fault, 20 if fault == "silent" else 4)
    status = tile_in_shares(row("s3://bucket/slide.tiff"), "s3://bucket/store")
    assert status.status == "committed", status.error
    assert faults.spoilt > (1 if fault == "silent" else 5)
    assert same_slides(contents(tmp_path / "bucket" / "store"), undisturbed)


@pytest.mark.slow
def test_a_source_that_stays_away_is_tried_again_by_the_next_run(
    behind: tuple[S3Server, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.2)
    _, faults = behind
    faults.times("busy", 1000, "GET", "slide.tiff")
    status = store_slide(row("s3://bucket/slide.tiff"), SPEC, str(tmp_path / "store"))
    assert (status.reason or "").startswith("source: ")
    assert "SlowDown" in (status.reason or "")
    assert not list((tmp_path / "store").rglob("*"))
    faults.times("busy", 0)
    assert store_slide(row("s3://bucket/slide.tiff"), SPEC, str(tmp_path / "store")).status == "committed"


@pytest.mark.slow
def test_a_server_killed_mid_slide_is_waited_for(
    behind: tuple[S3Server, Faults], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    server, faults = behind
    with ThreadPoolExecutor(1) as pool:
        down = threading.Event()

        def killing(method: str, path: str) -> None:
            if "/part-00002-" in path and not down.is_set():
                server.kill()
                down.set()

        faults.choose = killing
        run = pool.submit(tile_in_shares, row("s3://bucket/slide.tiff"), "s3://bucket/store")
        assert down.wait(30)
        with serve_s3(tmp_path) as again:
            faults.upstream = again.endpoint
            assert run.result(timeout=60).status == "committed"
    assert same_slides(contents(tmp_path / "bucket" / "store"), undisturbed)


def test_a_disk_that_fails_to_read_says_nothing_about_the_slide() -> None:
    """The kernel's own EIO: no page stands at address 0."""
    with closing(LocalSource(Path("/proc/self/mem"))) as source:
        source.size = 10  # the kernel states none
        with pytest.raises(SlideError, match="mem: cannot be read: Input/output error") as caught:
            source.read([(0, 10)])
    assert caught.value.reason in tiler.TRANSIENT


def test_a_slide_beyond_the_nodes_cache_is_tried_again_with_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    Image.fromarray(RGB).save(tmp_path / "bucket" / "slide.tiff")
    spec = SPEC.model_copy(update={"mpp": None, "cache_gib": 1e-9, "cache": str(tmp_path / "cache")})
    with serve_s3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        status = store_slide(row("s3://bucket/slide.tiff"), spec, str(tmp_path / "store"))
        assert (status.reason or "").startswith("cache: ")
        roomy = spec.model_copy(update={"cache_gib": 1.0})
        assert store_slide(row("s3://bucket/slide.tiff"), roomy, str(tmp_path / "store")).status == "committed"


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Let the kernel refuse to write more than so many bytes of a file, as a quota does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_written_whole_is_not_there(
    slide: Path, undisturbed: dict[str, bytes], tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    begun = begin_slide(row(slide), SPEC, str(tmp_path / "store"), whole=False)
    assert isinstance(begun, LargeSlide)
    largest = max(len(data) for name, data in undisturbed.items() if name.endswith(".arrow"))
    file_limit(largest - 1)
    with pytest.raises(StorageError, match=r"cannot write .*part-.*\.arrow: File too large; mend that and run again"):
        tiler.store_share(begun, range(part_count(begun.planned.tiling)), SPEC, str(tmp_path / "store"))
    file_limit(resource.RLIM_INFINITY)
    left = contents(tmp_path / "store")
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(undisturbed[name] == data for name, data in left.items() if "/unfinished/" not in name)
    assert tile_in_shares(row(slide), str(tmp_path / "store")).status == "committed"
    assert contents(tmp_path / "store") == undisturbed


def test_a_full_disk_is_named() -> None:
    """The kernel's own answer, from the device that is always full."""
    with (
        pytest.raises(StorageError, match=r"cannot write /data/file: the disk, or its quota, is full; free space"),
        files.failures("/data/file", "write"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"data")
