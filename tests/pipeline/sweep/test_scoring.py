"""What a worker makes of a slide."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.bags.sources import open_bag, tiled
from pipeline.cohort.table import CohortSlide
from pipeline.config.sweep import SettingsGrid
from pipeline.inference.prediction import load_model, predict_bag
from pipeline.ingest.tiler import store_slide
from pipeline.sweep.cells import Scoring, expand
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.models import SweepModel
from pipeline.sweep.scoring import Pass, Task, lost
from tests.pipeline.small import small_config, write_slide
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


def test_what_the_store_has_is_taken_from_there(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.png", 4)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    config = small_config()
    status = store_slide(slide, config.tiling, str(tmp_path / "store"))
    with tiled(config, slide, str(tmp_path / "store")) as (source, _):
        assert getattr(source, "uri", "").startswith(str(tmp_path / "store"))
        assert source.key == status.key
    with tiled(config, slide, str(tmp_path / "empty")) as (source, scratch):
        assert getattr(source, "uri", "").startswith(scratch)
    assert not (tmp_path / "empty").exists()


def test_a_lost_worker_s_slide_is_a_failure_that_may_pass(tmp_path: Path) -> None:
    slide = CohortSlide("s", "/s.png", "p", None, None, {}, {})
    scorings = _scorings(tmp_path, slide)
    rows = lost(Task(slide, "source", ("a",)), scorings, "killed")
    assert [(row["reason"], row["message"]) for row in rows] == [("crash", "killed")] * 2
