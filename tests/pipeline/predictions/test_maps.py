from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline.inference.explain import Explanation
from pipeline.inference.prediction import BagPrediction
from pipeline.predictions.maps import METADATA, as_parquet, colours, definitions, histograms, map_table, read_maps
from pipeline.store.index import PatchIndex
from tests.pipeline.small import small_config


def _table(attention: list[float], effect: list[float] | None = None) -> pa.Table:
    n = len(attention)
    places = np.arange(n) * 32
    index = PatchIndex(places, places + 1, places, places, places)
    found = BagPrediction({}, {}, np.array(attention, np.float32), np.array([n - 1, 0]))
    explanation = None if effect is None else Explanation({"tumour_yes": np.array(effect, np.float32)}, {})
    return map_table(index, 32.5, found, explanation, small_config())


def test_a_row_a_patch_with_what_the_numbers_mean() -> None:
    table = _table([0.1, 0.2, 0.3, 0.4], [0.0, 0.5, -1.0, 2.0])
    assert table.column_names == ["row", "x", "y", "size", "score", "attention", "selected", "effect_tumour_yes"]
    assert table["score"].to_pylist() == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert table["selected"].to_pylist() == [True, False, False, True]
    assert table["y"].to_pylist() == [1, 33, 65, 97]
    about = json.loads(table.schema.metadata[METADATA])
    assert set(about) == {"attention", "score", "effect_tumour_yes"}
    assert all(one["version"].endswith("/1") and one["definition"] and one["unit"] for one in about.values())
    again = read_maps(as_parquet(table))
    assert again.equals(table, check_metadata=True)
    assert as_parquet(again) == as_parquet(table)
    assert read_maps(as_parquet(table), ["x"]).column_names == ["x"]


def test_a_definition_says_what_the_outputs_are_pooled_of() -> None:
    one = small_config()
    every = one.model_copy(update={"model": one.model.model_copy(
        update={"select": one.model.select.model_copy(update={"context": "all"})})})  # fmt: skip
    said = [definitions(config, ["tumour_yes"], [])["effect_tumour_yes"]["definition"] for config in (one, every)]
    assert "the 5 selected patches" in said[0]
    assert "all patches" in said[1]
    drawn = one.model_copy(update={"model": one.model.model_copy(
        update={"select": one.model.select.model_copy(update={"mode": "random"})})})  # fmt: skip
    assert "0 for the others" in definitions(drawn, [], [])["attention"]["definition"]


def test_scales_are_those_of_all_slides_each_counting_alike() -> None:
    """A slide of two patches, one at 8 times uniform, beside one of a thousand uniform ones."""
    small = histograms(_table([0.1, 0.9], [0.0, -3.0]))
    large = histograms(_table([1 / 1000] * 1000, [1e-12] * 1000))
    assert large["effect"] == {"-": 1000}
    assert sum(small["score"].values()) == 2
    found = colours([small, large])
    assert found == colours([large, small])
    assert 1.8 <= found["score"]["high"] <= 1.8 * 10 ** (1 / 20) + 0.3
    assert 3 <= found["effect"]["high"] <= 3 * 10 ** (1 / 20) + 0.01
    assert found["effect"]["low"] == -found["effect"]["high"]
    assert found["score"]["low"] == 1
    assert set(colours([histograms(_table([0.5, 0.5]))])) == {"score"}


def test_one_patch_of_many_does_not_set_the_scale() -> None:
    """Beyond the quantile what is rare is shown as the end of the scale."""
    rare = histograms(_table([0.5] + [0.5 / 9999] * 9999))
    assert colours([rare])["score"]["high"] == 2.0
