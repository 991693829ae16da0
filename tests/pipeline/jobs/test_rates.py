from __future__ import annotations

import pytest

from pipeline.jobs.rates import Measured, Rates, machine_kind, recipe_of
from tests.pipeline.small import small_config


def test_a_machine_s_kind_is_no_name_of_its_own() -> None:
    assert machine_kind() == machine_kind()
    assert "CPUs" in machine_kind()


@pytest.mark.parametrize(
    "change",
    [
        {"tiling": {"patch_px": 64, "mpp": None}},
        {"model": {"encoder": {"stages": 4}}},
        {"train": {"score_dtype": "bfloat16"}},
    ],
)
def test_another_recipe_has_other_rates(change: dict[str, object]) -> None:
    assert recipe_of(small_config()) != recipe_of(small_config(**change))
    assert recipe_of(small_config()) == recipe_of(small_config(train={"epochs": 7}, cluster={"workers": 3}))


def test_whether_a_gpu_did_it_is_known() -> None:
    slide = Measured(10.0, 5, 1.0, 1.0, 1.0)
    made = {
        machine: Rates(machine, "r", (slide,), 1.0, 1.0, "") for machine in ("x86_64, 2 CPUs", "x, GPU NVIDIA H100")
    }
    assert [one.gpu for one in made.values()] == [False, True]
