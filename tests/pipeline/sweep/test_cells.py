"""Cells are named by what they are, and settings that mean the same are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cohort.table import CohortSlide
from pipeline.config.sweep import SettingsGrid
from pipeline.errors import ConfigError
from pipeline.sweep.cells import expand
from pipeline.sweep.cohorts import SweptCohort
from pipeline.sweep.models import SweepModel
from tests.pipeline.small import small_config

SLIDE = CohortSlide("s", "/s.png", "p", None, None, {"tumour": "no"}, {})
COHORT = SweptCohort("all", "cohort.csv", (SLIDE,), ("source",), {})


def _model(digest: str = "d", **changes: Any) -> SweepModel:
    return SweepModel(f"m-{digest}", "models:/m/1", digest, small_config(**changes), "/folder", 100)


def _texts(model: SweepModel, **grid: Any) -> list[str]:
    return [cell.scoring.setting.text for cell in expand([model], [COHORT], SettingsGrid(**grid)).cells]


def test_without_a_grid_a_model_predicts_as_it_was_trained() -> None:
    (cell,) = expand([_model()], [COHORT], SettingsGrid()).cells
    assert cell.scoring.setting.text == "exact, M 5"
    assert cell.scoring.config == cell.scoring.model.config


def test_a_grid_is_every_combination_that_means_something() -> None:
    assert _texts(_model(), mode=("exact", "every"), memory=(4, 9)) == ["exact, M 4", "exact, M 9", "every"]
    assert _texts(_model(), mode=("random", "window"), seed=(0, 1)) == [
        "random, M 5, seed 0",
        "random, M 5, seed 1",
        "window, M 5",
    ]
    assert _texts(_model(), precision=("float32", "bfloat16")) == ["exact, M 5", "exact, M 5, bfloat16"]
    assert _texts(_model(), mode=("every", "random"), precision=("float32", "bfloat16")) == [
        "every",
        "random, M 5, seed 0",
    ]


def test_digests_are_of_what_decides_predictions() -> None:
    base = expand([_model()], [COHORT], SettingsGrid()).cells[0]
    moved = expand(
        [_model(name="other", storage={"root": "elsewhere"}, train={"lr": 0.5})], [COHORT], SettingsGrid()
    ).cells[0]
    assert moved.digest == base.digest  # where it lies and how it was trained are in the model's own digest
    others = [
        expand([_model("e")], [COHORT], SettingsGrid()),
        expand([_model()], [COHORT], SettingsGrid(memory=(6,))),
        expand([_model()], [SweptCohort("all", "c", (SLIDE,), ("changed",), {})], SettingsGrid()),
    ]
    assert len({base.digest, *(found.cells[0].digest for found in others)}) == 4
    renamed = SweptCohort("other", "c", (SLIDE,), ("source",), {})
    assert expand([_model()], [renamed], SettingsGrid()).cells[0].digest == base.digest


def test_the_chunk_counts_in_window_mode_alone() -> None:
    def digest(mode: str, chunk: int) -> str:
        select = {"mode": mode, "memory": 5, "chunk": chunk}
        model = {"encoder": {"stages": 2}, "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16}, "select": select}
        return expand([_model(model=model)], [COHORT], SettingsGrid()).cells[0].scoring.digest

    assert digest("exact", 7) == digest("exact", 9)
    assert digest("window", 7) != digest("window", 9)


def test_magnification_is_a_setting_where_the_tiling_knows_microns() -> None:
    tiling = {"patch_px": 32, "mpp": 2.0}
    found = expand([_model(tiling=tiling), _model("e")], [COHORT], SettingsGrid(mpp=(1.0, 2.0)))
    assert [cell.scoring.setting.mpp for cell in found.cells] == [1.0, None]
    assert [cell.scoring.config.tiling.mpp for cell in found.cells] == [1.0, 2.0]
    around = expand([_model(tiling={**tiling, "context_mpp": 6.0})], [COHORT], SettingsGrid(mpp=(1.0, 2.0)))
    assert [cell.scoring.config.tiling.context_mpp for cell in around.cells] == [3.0, 6.0]
    assert len({cell.scoring.pixels for cell in found.cells}) == 2
    assert found.left_out[0].startswith("m-e (exact, M 5, 1 ")
    assert "level 0 as it is" in found.left_out[0]


def test_a_threshold_of_sharpness_holds_at_its_own_magnification_alone() -> None:
    sharp = {"patch_px": 32, "mpp": 2.0, "min_sharpness": 50.0}
    found = expand([_model(tiling=sharp)], [COHORT], SettingsGrid(mpp=(1.0, 2.0)))
    assert [cell.scoring.config.tiling.mpp for cell in found.cells] == [2.0]
    assert "its tiling.min_sharpness=50 was chosen at tiling.mpp=2 and holds at no other" in found.left_out[0]
    measured = expand([_model(tiling={**sharp, "min_sharpness": 0.0})], [COHORT], SettingsGrid(mpp=(1.0, 2.0)))
    assert len(measured.cells) == 2  # which leaves out nothing


def test_what_a_pool_cannot_do_is_left_out_and_told() -> None:
    gated = {
        "encoder": {"stages": 2},
        "aggregator": {"pool": "gated", "hidden_dim": 16},
        "select": {"mode": "every", "memory": 64, "chunk": 7},
    }
    found = expand([_model(model=gated)], [COHORT], SettingsGrid(mode=("every", "exact")))
    assert [cell.scoring.setting.mode for cell in found.cells] == ["every"]
    assert "has no attention that could select" in found.left_out[0]
    with pytest.raises(ConfigError, match="no model can take any of its settings"):
        expand([_model(model=gated)], [COHORT], SettingsGrid(mode=("exact",)))


def test_what_the_encoder_learned_from_keeps_no_mode_out() -> None:
    select = {"memory": 5, "context": "all", "learn_from": "drawn"}
    model = {"encoder": {"stages": 2}, "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16}, "select": select}
    found = expand([_model(model=model)], [COHORT], SettingsGrid(mode=("exact", "window")))
    assert [cell.scoring.setting.mode for cell in found.cells] == ["exact", "window"]
    assert found.left_out == ()


def test_every_model_meets_every_cohort() -> None:
    other = SweptCohort("other", "c", (SLIDE,), ("b",), {})
    cells = expand([_model(), _model("e")], [COHORT, other], SettingsGrid(memory=(3, 4))).cells
    assert len(cells) == len({cell.digest for cell in cells}) == 8
    assert Path(cells[0].scoring.model.folder) == Path("/folder")
