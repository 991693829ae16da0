from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ips.selection.transfer import arrived
from pipeline.bags import streamed as module
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.sources import open_sources, patch_root, patch_store
from pipeline.bags.streamed import PassingSlide, StreamedSlide, plan_root
from pipeline.cohort.table import Cohort, read_cohort
from pipeline.columnar import Columnar
from pipeline.config.data import TilingConfig
from pipeline.errors import PlanError, SlideError, StageError, StorageError
from pipeline.ingest.tiler import begin_slide, store_slide
from pipeline.results.quality_pictures import picture
from pipeline.store.patches import PatchStore, SlideStatus, StoredSlide
from pipeline.training.plan import epoch_plan
from pipeline.workflow.run import run
from pipeline.workflow.stage import Record, Workspace
from pipeline.workflow.stages import STAGES
from tests.pipeline.small import small_config, store_slides, write_cohort, write_slide
from tests.pipeline.test_columnar import through_ray
from tests.pipeline.tiled import open_plan
from tests.pipeline.tiling.test_cutting import spoil
from tests.synth import tissue_rgb, write_pyramid

Pairs = list[tuple[StreamedSlide, StoredSlide]]

CPU = torch.device("cpu")


def stream_slides(cohort: Cohort, root: Path, spec: TilingConfig) -> list[StreamedSlide]:
    """Plan every slide."""
    found = []
    for slide in cohort.slides:
        status = begin_slide(slide, spec, plan_root(str(root)), whole=True, pixels=False)
        plans = PatchStore(plan_root(str(root)), spec.fingerprint())
        found.append(open_plan(slide, spec, plans, str(status.key)))  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Slides as streamed and as stored."""
    folder = tmp_path_factory.mktemp("slides")
    cohort = write_cohort(folder, ["no", "yes", "no"])
    stored = [source for _, source in store_slides(cohort, folder / "store", small_config())]
    return list(zip(stream_slides(cohort, folder / "store", small_config().tiling), stored, strict=True))


def test_a_plan_has_the_places_of_the_store_and_no_patches(pairs: Pairs) -> None:
    for streamed, stored in pairs:
        assert (streamed.key, streamed.n_patches, streamed.extent) == (stored.key, stored.n_patches, stored.extent)
        assert streamed.patch_px == stored.patch_px
        assert streamed.thumbnail() == stored.thumbnail()
        assert streamed.thumbnail_scale == stored.thumbnail_scale
        assert np.array_equal(streamed.index().x, stored.index().x)
        assert np.array_equal(streamed.index().y, stored.index().y)
        rows = np.arange(stored.n_patches)
        assert np.array_equal(streamed.positions(rows), stored.positions(rows))
        assert not list(Path(streamed.patches.uri).glob("*.arrow"))
        assert picture(streamed.patches).kept == ()
    assert pairs[0][0].key != pairs[1][0].key


def test_patches_have_the_bytes_that_the_store_holds(pairs: Pairs) -> None:
    for streamed, stored in pairs:
        rows = np.arange(stored.n_patches)
        assert streamed.payloads(rows) == stored.payloads(rows)
        assert streamed.payloads([7, 2, 7]) == stored.payloads([7, 2, 7])
    assert len(module._open) == module.MAX_OPEN


def test_original_tiles_of_a_real_slide_are_the_store_s(shared_slides: Path, tmp_path: Path) -> None:
    source = shared_slides / "CMU-1-Small-Region.svs"
    if not source.exists():
        (source,) = shared_slides.rglob("CMU-1-Small-Region.svs")
    cohort = write_cohort(tmp_path, ["no"])
    slide = cohort.slides[0].__class__("svs", str(source), "p", "test", None, {"tumour": "no"}, {})
    config = small_config(tiling={"patch_px": 240, "mpp": None, "min_tissue": 0.5})
    cohort = Cohort(cohort.uri, (slide,))
    ((_, stored),) = store_slides(cohort, tmp_path / "store", config)
    (streamed,) = stream_slides(cohort, tmp_path / "store", config.tiling)
    assert streamed.key == stored.key
    rows = np.arange(0, stored.n_patches, 7)
    assert streamed.payloads(rows) == stored.payloads(rows)


@pytest.mark.parametrize("augment", [None, Augment(3, 1, "")])
def test_bags_of_both_kinds_give_the_same_chunks(pairs: Pairs, augment: Augment | None) -> None:
    bags = [PatchBag([source], threads=2, augment=augment) for source in pairs[1]]
    for one, other in zip(*(bag.chunks(4) for bag in bags), strict=True):
        assert torch.equal(arrived(one, CPU), arrived(other, CPU))
        assert torch.equal(one.index, other.index)
        assert one.positions is not None
        assert other.positions is not None
        assert torch.equal(one.positions, other.positions)
    rows = torch.tensor([5, 0, 11])
    assert torch.equal(*(arrived(bag.take(rows), CPU) for bag in bags))


@pytest.mark.slow
def test_a_process_that_ends_closes_the_slides_that_openslide_holds(tmp_path: Path) -> None:
    """After the interpreter has taken OpenSlide apart, closing one prints a traceback."""
    picture = Image.fromarray(tissue_rgb(1013, 787)).quantize(256)
    colours = np.array(picture.getpalette("RGB"), np.uint16).reshape(-1, 3).T * 257
    palette = {"photometric": "palette", "colormap": np.pad(colours, ((0, 0), (0, 256 - colours.shape[1])))}
    tifffile.imwrite(tmp_path / "a.tiff", np.asarray(picture), tile=(256, 256), **palette)  # OpenSlide alone reads it
    program = f"""
import numpy as np
from pathlib import Path
from tests.pipeline.bags.test_streamed import stream_slides
from tests.pipeline.small import small_config, write_cohort
from pipeline.bags import streamed as module
from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.slides.openslide import OpenSlideReader
slide = CohortSlide("a", {str(tmp_path / "a.tiff")!r}, "p", "test", None, {{"tumour": "no"}}, {{}})
cohort = Cohort("c.csv", (slide,))
(streamed,) = stream_slides(cohort, Path({str(tmp_path / "store")!r}), small_config().tiling)
streamed.payloads(np.arange(3))
((reader, _),) = module._open.values()
assert isinstance(reader, OpenSlideReader), reader
print("read")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("read\n", 0), done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_slide_that_was_replaced_is_refused(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, ["no"])
    (streamed,) = stream_slides(cohort, tmp_path / "store", small_config().tiling)
    write_slide(Path(streamed.uri), seed=99)
    os.utime(streamed.uri, (1, 1))
    with pytest.raises(SlideError, match="replaced while it was trained on"):
        streamed.payloads([0])


def test_a_slide_that_was_replaced_between_its_plan_and_the_training_is_refused(tmp_path: Path) -> None:
    cohort, spec = write_cohort(tmp_path, ["no"]), small_config().tiling
    (before,) = stream_slides(cohort, tmp_path / "store", spec)
    write_slide(Path(before.uri), seed=99)
    os.utime(before.uri, (1, 1))
    plans = PatchStore(plan_root(str(tmp_path / "store")), spec.fingerprint())
    with pytest.raises(SlideError, match="s0.png: the file was replaced after it was planned; run again") as caught:
        open_plan(before.slide, spec, plans, before.key)
    assert caught.value.reason == "changed"
    (after,) = stream_slides(cohort, tmp_path / "store", spec)
    assert after.key != before.key
    with pytest.raises(SlideError, match="after it was planned"):  # what an older record of the stage says
        open_plan(before.slide, spec, plans, before.key)


def test_a_slide_that_was_only_touched_is_planned_anew_and_opens(tmp_path: Path) -> None:
    cohort, spec = write_cohort(tmp_path, ["no"]), small_config().tiling
    (before,) = stream_slides(cohort, tmp_path / "store", spec)
    os.utime(before.uri, (1, 1))
    (after,) = stream_slides(cohort, tmp_path / "store", spec)
    assert (after.key, after.version.mtime) == (before.key, 1)
    assert after.payloads([0])


def test_planned_slides_travel_as_columns(tmp_path: Path) -> None:
    config = small_config(storage={"patches": str(tmp_path / "patches")}, train={"source": "stream", "augment": False})
    plans = tmp_path / "patches"
    planned = stream_slides(write_cohort(tmp_path, ["no", "yes"]), plans, config.tiling)
    keys = {one.slide.slide_id: one.key for one in planned}
    (tmp_path / "cohort.csv").write_text("slide_id,uri\ns1,s1.png\ns0,s0.png\n")
    slides = read_cohort(str(tmp_path / "cohort.csv")).slides
    found = open_sources(config, slides, keys)
    assert isinstance(found, Columnar)
    assert list(through_ray(found)) == open_sources(config, list(slides), keys)
    assert [(slide.slide_id, source.key) for slide, source in found] == [(name, keys[name]) for name in ("s1", "s0")]


def test_a_slide_planned_from_another_version_of_its_file_is_not_done(tmp_path: Path) -> None:
    """By another job, while this one's record of the stage stays what it was."""
    config = small_config(storage={"patches": str(tmp_path / "patches")}, train={"source": "stream", "augment": False})
    cohort, root = write_cohort(tmp_path, ["no", "yes"]), patch_root(config)
    keys = {}
    for slide in cohort.slides:
        status = begin_slide(slide, config.tiling, root, whole=True, pixels=False)
        assert isinstance(status, SlideStatus)
        keys[slide.slide_id] = str(status.key)
    record = Record("tile", "f", {}, {}, {"keys": keys})

    def outdated() -> str | None:
        space = Workspace(config, cohort, lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {})
        return STAGES[0].outdated(space, record)

    changed = cohort.slides[1]
    assert outdated() is None
    before = Path(changed.uri).stat()
    write_slide(Path(changed.uri), seed=99)
    begin_slide(changed, config.tiling, root, whole=True, pixels=False)
    assert outdated() == "1 slides were planned from another version: s1"
    write_slide(Path(changed.uri), seed=1)
    os.utime(changed.uri, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert outdated() is None  # what the first version became is known as well


def _torn(folder: Path, spec: TilingConfig, *, tiles: int) -> tuple[Cohort, str, SlideStatus]:
    """A slide of 9 x 7 patches, each a tile, of which some cannot be decoded; and what a store makes of it."""
    path = write_pyramid(folder / "torn.tiff", tissue_rgb(613, 487, seed=5), levels=1, tile=64)
    for number in range(23, 23 + tiles):
        spoil(path, number, "cut short")
    cohort = write_cohort(folder, ["no"])
    slide = replace(cohort.slides[0], uri=str(path), mpp=0.5)
    return Cohort(cohort.uri, (slide,)), str(folder / "plans"), store_slide(slide, spec, str(folder / "store"))


def test_after_a_patch_that_cannot_be_decoded_the_next_plan_is_the_store_s(tmp_path: Path) -> None:
    spec = TilingConfig(patch_px=64, mpp=None, tissue="none", max_bad_tiles=0.1)
    cohort, root, status = _torn(tmp_path, spec, tiles=2)
    stored = PatchStore(str(tmp_path / "store"), spec.fingerprint()).slide(str(status.key))
    assert stored.n_bad_tiles == 2
    (before,) = stream_slides(cohort, Path(root), spec)
    assert (before.key, before.n_patches, before.n_bad_tiles) == (stored.key, stored.n_patches + 2, 0)
    with pytest.raises(PlanError, match=r"torn.tiff: the patch of row \d+ cannot be decoded \(") as caught:
        before.payloads(np.arange(before.n_patches))
    assert caught.value.key == stored.key

    plans = PatchStore(plan_root(root), spec.fingerprint())
    plans.distrust(caught.value.key)
    assert not plans.has(stored.key)
    (after,) = stream_slides(cohort, Path(root), spec)
    assert (after.key, after.n_patches, after.n_bad_tiles) == (stored.key, stored.n_patches, 2)
    rows = np.arange(stored.n_patches)
    assert np.array_equal(after.index().x, stored.index().x)
    assert np.array_equal(after.index().y, stored.index().y)
    assert after.payloads(rows) == stored.payloads(rows)
    plans.look_again()
    facts = [store.facts(stored.key) for store in (plans, PatchStore(str(tmp_path / "store"), spec.fingerprint()))]
    assert facts[0]["bad_tiles"] == facts[1]["bad_tiles"]
    assert facts[0]["rejects"] == facts[1]["rejects"]
    for streamed, kept in zip(
        PatchBag([after], threads=1, augment=Augment(3, 1, "")).chunks(7),
        PatchBag([stored], threads=1, augment=Augment(3, 1, "")).chunks(7),
        strict=True,
    ):
        assert torch.equal(arrived(streamed, CPU), arrived(kept, CPU))


def test_a_slide_over_the_budget_is_quarantined_by_both(tmp_path: Path) -> None:
    spec = TilingConfig(patch_px=64, mpp=None, tissue="none", max_bad_tiles=0.02, edge="drop")
    cohort, root, status = _torn(tmp_path, spec, tiles=3)
    (before,) = stream_slides(cohort, Path(root), spec)
    PatchStore(plan_root(root), spec.fingerprint()).distrust(before.key)
    again = begin_slide(cohort.slides[0], spec, plan_root(root), whole=True, pixels=False)
    assert isinstance(again, SlideStatus)
    assert (again.status, again.reason) == (status.status, status.reason)
    assert str(again.reason).startswith("bad-tiles: 2 of 63 patches cannot be decoded, over tiling.max_bad_tiles=0.02")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_that_meets_it_removes_the_plan_and_the_next_one_trains_on_a_mended_plan(
    ray_session: None, tmp_path: Path
) -> None:
    """From nothing: what the first run saved before it met the patch belongs to a recipe of other patches."""
    lines = ["slide_id,uri,split,label"]
    for number, split in enumerate(("val", "train", "train", "train", "test", "test")):
        width, height = (293, 229) if number == 3 else (613, 487)  # 4 x 3 patches, or 9 x 7
        write_pyramid(tmp_path / f"s{number}.tiff", tissue_rgb(width, height, seed=number), levels=1, tile=64)
        lines.append(f"s{number},s{number}.tiff,{split},{number % 2}")
    spoil(tmp_path / "s3.tiff", 5, "cut short")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
    seed = next(seed for seed in range(99) if _order(seed)[-1] == 2)  # the torn one comes last
    config = small_config(
        seed=seed,
        cohort={"uri": str(tmp_path / "cohort.csv")},
        tasks=[{"name": "tumour", "column": "label"}],
        storage={"root": str(tmp_path / "root"), "patches": str(tmp_path / "root" / "patches")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "torn"},
        tiling={"patch_px": 64, "mpp": None, "tissue": "none", "max_bad_tiles": 0.1, "cpus": 0.5},
        train={"source": "stream", "epochs": 1, "batch_size": 1, "warmup_epochs": 0, "shard_above": None},
        cluster={"cpus_per_worker": 1, "checkpoint_steps": 1},
    )
    with pytest.raises(StageError, match=r"s3.tiff: the patch of row 5 .*\. Run again: the tile stage then reads this"):
        run(config, "train")
    assert len(list(tmp_path.glob("root/train/*/*/checkpoint.json"))) in (1, 2)
    assert len(patch_store(config).view.slides) == 5
    done = run(config, "train").stages
    assert (done["tile"].outcome, done["train"].outcome) == ("done", "done")
    assert done["tile"].record.metrics["bad_tiles"] == 1
    assert done["train"].record.metrics["epoch"] == 1
    assert len(list(tmp_path.glob("root/train/*"))) == 2
    assert run(config, "train").outcome == "nothing to do"


def _order(seed: int) -> list[int]:
    """Of the training slides, a step each."""
    return [
        index
        for step in epoch_plan([63, 63, 12], batch_size=1, world_size=1, seed=seed, epoch=0)
        for index in step.slides
    ]


def test_a_slide_that_was_never_planned_is_named(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no committed slide"):
        open_plan(pairs[0][0].slide, pairs[0][0].spec, PatchStore(str(tmp_path), "aa"), "abc")


def _passing(one: StreamedSlide) -> PassingSlide:
    return PassingSlide(one.patches, one.slide, one.spec, one.version)


def test_a_slide_that_is_read_once_gives_the_same_bytes_and_is_read_by_another_process(pairs: Pairs) -> None:
    for streamed, stored in pairs:
        rows = np.arange(stored.n_patches)[::-1]
        module._close()
        assert _passing(streamed).payloads(rows) == stored.payloads(rows)
        assert not module._open  # here
        assert len(PatchBag([_passing(streamed)], threads=1, augment=None)) == stored.n_patches


def test_a_slide_that_breaks_or_keeps_the_process_costs_itself(tmp_path: Path, pairs: Pairs) -> None:
    one = _passing(pairs[0][0])
    gone = replace(one, slide=replace(one.slide, uri=str(tmp_path / "gone.png")))
    with pytest.raises(SlideError, match=r"gone\.png"):
        gone.payloads([0])
    held = replace(one, spec=one.spec.model_copy(update={"max_slide_gib": 1e-3}))
    with pytest.raises(SlideError) as caught:  # it is looked at once in 50 ms
        held.payloads(np.tile(np.arange(held.n_patches), 2000))
    assert caught.value.reason == "too-expensive"
