"""What a worker makes of a slide."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.bags.sources import open_bag
from pipeline.bags.unseen import tiled
from pipeline.cohort.table import CohortSlide
from pipeline.config.sweep import SettingsGrid
from pipeline.inference.prediction import load_model, predict_bag
from pipeline.inference.shards import Joined
from pipeline.ingest.tiler import store_slide
from pipeline.model.folder import TISSUE_NETWORK, read_config
from pipeline.store.patches import PatchStore
from pipeline.sweep import overlays
from pipeline.sweep.cells import Scoring, expand
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.models import SweepModel
from pipeline.sweep.scoring import Pass, Task, lost, readings
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.small import small_config, write_slide
from tests.pipeline.sweep.made import made_cells, made_cohort
from tests.pipeline.sweep.small_sweep import write_model


def _scorings(tmp_path: Path, slide: CohortSlide) -> list[Scoring]:
    """Two models: one of pixels, one whose weights are no numbers."""
    models = []
    for number, name in enumerate(("good", "broken")):
        folder = write_model(tmp_path / name, number)
        models.append(SweepModel(name, str(folder), name, small_config(), str(folder), 100))
    broken, _ = load_model(tmp_path / "broken")
    from pipeline.model.folder import save_model

    state = {key: value.cpu() for key, value in broken.state_dict().items()}
    head = next(key for key in state if key.startswith("heads."))
    save_model(tmp_path / "broken", {**state, head: torch.full_like(state[head], float("nan"))}, small_config())
    cohort = SweptCohort("all", "c", (slide,), ("source",), {})
    return [cell.scoring for cell in expand(models, [cohort], SettingsGrid()).cells]


def test_each_scoring_has_its_row_and_fails_alone(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.png", 4)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    scorings = _scorings(tmp_path, slide)
    score = Pass(tuple(scorings), None).worker()
    task = Task(slide, "source", tuple(scoring.digest for scoring in scorings))
    good, broken = score(task)
    config = scorings[0].config
    model, _ = load_model(tmp_path / "good")
    with tiled(config, slide) as (source, _):
        expected = predict_bag(model, open_bag(source, threads=1, augment=None), config)
        assert good["key"] == source.key
    assert good["outputs"] == expected.values["tumour"].tolist()
    assert (good["patches_scored"], good["patches_total"], good["source"]) == (20, 20, "source")
    assert good["seconds"] > 0
    assert good["read_seconds"] > 0
    assert good["peak_bytes"] > 10**6
    assert broken["outputs"] is None
    assert broken["reason"] in ("not-finite", "crash")
    (alone,) = score(Task(slide, "source", (scorings[0].digest,)))
    assert alone["outputs"] == good["outputs"]


def test_a_large_slide_s_shards_give_the_rows_of_one_process(tmp_path: Path) -> None:
    """Exact selection is split; what cannot be is scored by whoever joins the shards."""
    write_slide(tmp_path / "s.png", 4)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    store_slide(slide, small_config().tiling, str(tmp_path / "store"))
    model = SweepModel("m", "m", "m", small_config(), str(write_model(tmp_path / "m", 1)), 100)
    cohort = SweptCohort("all", "c", (slide,), ("source",), {})
    grid = SettingsGrid(mode=("exact", "window", "random"), memory=(3, 5))
    scorings = tuple(cell.scoring for cell in expand([model], [cohort], grid).cells)
    task = Task(slide, "source", tuple(scoring.digest for scoring in scorings))
    alone = Pass(scorings, str(tmp_path / "store")).worker()(task)
    work = Pass(scorings, str(tmp_path / "store"), shard_above=19, shards=3).worker()
    cut = work(task)
    assert [(shard.start, shard.stop, shard.rows) for shard in cut.parts] == [(0, 6, 20), (6, 13, 20), (13, 20, 20)]
    found = [work(shard) for shard in cut.parts]
    assert all(len(one.logits) == 2 for one in found)
    rows = work(Joined(task, tuple(found)))
    same = [{key: row[key] for key in row if not key.endswith("seconds")} for row in rows]
    for row, expected in zip(same, alone, strict=True):
        assert {key: row[key] for key in row if key not in ("finished", "peak_bytes")} == {
            key: expected[key] for key in row if key not in ("finished", "peak_bytes")
        }
    assert all(row["seconds"] > 0 for row in rows)
    at_the_limit = Pass(scorings, str(tmp_path / "store"), shard_above=20, shards=3).worker()
    assert isinstance(at_the_limit(task), list)
    not_stored = Pass(scorings, str(tmp_path / "empty"), shard_above=1, shards=3).worker()
    assert isinstance(not_stored(task), list)


def test_what_the_store_has_is_taken_from_there(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.png", 4)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    config = small_config()
    status = store_slide(slide, config.tiling, str(tmp_path / "store"))
    full, empty = (PatchStore(str(tmp_path / name), config.tiling.fingerprint()) for name in ("store", "empty"))
    with tiled(config, slide, full) as (source, _):
        assert getattr(source, "uri", "").startswith(str(tmp_path / "store"))
        assert source.key == status.key
    with tiled(config, slide, empty) as (source, scratch):
        assert getattr(source, "uri", "").startswith(scratch)
    assert not (tmp_path / "empty").exists()


def test_a_lost_worker_s_slide_is_a_failure_that_may_pass(tmp_path: Path) -> None:
    slide = CohortSlide("s", "/s.png", "p", None, None, {}, {})
    scorings = _scorings(tmp_path, slide)
    rows = lost(Task(slide, "source", ("a",)), scorings, "killed")
    assert [(row["reason"], row["message"]) for row in rows] == [("crash", "killed")] * 2


GIB = 2**30


def test_one_reading_for_all_that_share_a_tiling() -> None:
    cells = made_cells(made_cohort(5), ["a", "b"], memory=(3, 4))
    (one,) = readings(cells, defaultdict(set), 1.0, "store")
    assert one.models == ("a", "b")
    assert [task.source for task in one.tasks] == [f"source{i}" for i in range(5)]
    assert all(len(task.wanted) == 4 for task in one.tasks)
    assert one.bytes == 2 * 2 * 100  # each model once, whatever its settings, and its scoring copy


def test_what_is_done_is_not_read_and_nothing_is_nothing() -> None:
    cells = made_cells(made_cohort(5), ["a", "b"])
    done = {cells[0].scoring.digest: {f"source{i}" for i in range(5)}, cells[1].scoring.digest: {"source1"}}
    (one,) = readings(cells, done, 1.0, None)
    assert one.models == ("b",)
    assert [task.source for task in one.tasks] == ["source0", "source2", "source3", "source4"]
    done[cells[1].scoring.digest] = done[cells[0].scoring.digest]
    assert readings(cells, done, 1.0, None) == []


def test_a_slide_of_two_cohorts_is_read_once() -> None:
    whole, part = made_cohort(5), made_cohort(3, "part")
    first, second = made_cells(whole, ["a"])[0], made_cells(part, ["a"])[0]
    (one,) = readings([first, second], defaultdict(set), 1.0, None)
    assert len(one.tasks) == 5


def test_models_are_packed_into_the_memory_that_there_is() -> None:
    cells = [
        replace(cell, scoring=replace(cell.scoring, model=replace(cell.scoring.model, bytes=GIB)))
        for cell in made_cells(made_cohort(3), ["a", "b", "c"], memory=(3, 4))
    ]
    assert [one.models for one in readings(cells, defaultdict(set), 4.5, None)] == [("a", "b"), ("c",)]
    assert [one.models for one in readings(cells, defaultdict(set), 0.5, None)] == [("a",)] * 2 + [("b",)] * 2 + [
        ("c",)
    ] * 2


def test_tissue_is_found_by_the_network_that_is_kept_with_the_model(tmp_path: Path) -> None:
    """Wherever the sweep began, whose scratch is not the worker's, and wherever the model was trained."""
    write_slide(tmp_path / "s.png", 4)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, 0.5, {}, {})
    network = scripted(Toy(), tmp_path / "toy.pt")
    begun, folder = tmp_path / "scratch", tmp_path / "root"
    for place in (begun, folder):
        write_model(place, 1, tiling=small_tiling(network))
        (place / TISSUE_NETWORK).write_bytes(network.read_bytes())
    model = SweepModel("m", "m", "m", read_config(begun), str(folder), 100)
    network.unlink()
    shutil.rmtree(begun)
    cohort = SweptCohort("all", "c", (slide,), ("source",), {})
    (scoring,) = [cell.scoring for cell in expand([model], [cohort], SettingsGrid()).cells]
    (row,) = Pass((scoring,), None).worker()(Task(slide, "source", (scoring.digest,)))
    assert (row["message"], row["patches_total"]) == (None, 24)  # the network sees tissue from its margin on
    (drawn,) = overlays.draw_slides(scoring, str(folder), [slide], None)
    assert drawn is not None
