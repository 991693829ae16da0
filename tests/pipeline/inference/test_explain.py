"""Effects and curves against the model run again on what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ips.bag import TensorBag
from ips.network.pooling import MeanPool
from pipeline.config.recipe import Config
from pipeline.inference.explain import explain
from pipeline.inference.prediction import predict_bag
from pipeline.model.build import build_model
from tests.pipeline.small import PATCH, small_config

N = 13


def _config(context: str, memory: int = 5) -> Config:
    select = {"memory": memory, "chunk": 7, "context": context}
    aggregator = {"heads": 2, "key_dim": 4, "hidden_dim": 16}
    return small_config(model={"encoder": {"stages": 2}, "aggregator": aggregator, "select": select})


def _bag(rows: np.ndarray | None = None) -> TensorBag:
    pixels = torch.randint(0, 255, (N, 3, PATCH, PATCH), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pixels[::3] //= 3
    return TensorBag(pixels if rows is None else pixels[torch.from_numpy(rows)])


def _odds(p: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(p) - np.log1p(-p))


@pytest.mark.parametrize("context", ["all", "none"])
def test_an_effect_is_what_the_output_loses_without_the_patch(context: str) -> None:
    torch.manual_seed(3)
    config = _config(context)
    model = build_model(config)
    found = predict_bag(model, _bag(), config, heads=True, pooled=True)
    said = explain(model, config.tasks, found, "seed")
    assert said is not None
    assert found.pooled is not None
    pooled = found.pooled.rows
    assert sorted(pooled) == (list(range(N)) if context == "all" else sorted(found.selected))
    assert said.effect["tumour_yes"][np.setdiff1d(np.arange(N), pooled)].tolist() == [0.0] * (N - len(pooled))
    for row in pooled:
        left = np.setdiff1d(pooled, [row])
        other = predict_bag(model, _bag(left), _config(context, memory=len(left)))
        change = _odds(found.values["tumour"]) - _odds(other.values["tumour"])
        got = [said.effect[f"tumour_{name}"][row] for name in ("no", "yes")]
        np.testing.assert_allclose(got, change, atol=2e-5)
    assert found.heads is not None
    np.testing.assert_allclose(found.heads.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(found.heads.mean(axis=(1, 2)), found.attention, atol=1e-6)


def test_curves_are_predictions_of_what_is_left_and_of_what_came() -> None:
    torch.manual_seed(3)
    config = _config("all")
    model = build_model(config)
    found = predict_bag(model, _bag(), config, pooled=True)
    said = explain(model, config.tasks, found, "seed")
    assert said is not None
    curves = said.curves
    assert curves["fraction"][0] == 0
    assert curves["fraction"][-1] == 1
    order = np.argsort(-found.attention, kind="stable")
    for place, share in enumerate(curves["fraction"]):
        count = round(share * N)
        for kind, rows in (("deletion", order[count:]), ("insertion", order[:count])):
            value = curves["attention"][kind]["tumour_yes"][place]
            if not len(rows):
                assert value is None
                continue
            expected = predict_bag(model, _bag(rows), _config("all", memory=len(rows))).values["tumour"][1]
            assert value == pytest.approx(expected, abs=1e-5)
    again = explain(model, config.tasks, found, "seed")
    assert again is not None
    assert again.curves == curves
    for kind in ("deletion", "insertion"):  # the effect's order is at least as good as chance at its ends
        assert len(curves["effect"][kind]["tumour_no"]) == len(curves["fraction"])


def test_a_pool_that_does_not_tell_and_a_patch_alone_have_none() -> None:
    torch.manual_seed(3)
    config = _config("none")
    model = build_model(config)
    assert explain(model, config.tasks, predict_bag(model, _bag(), config), "") is None  # not asked for
    alone = predict_bag(model, _bag(np.array([4])), config, pooled=True)
    assert explain(model, config.tasks, alone, "") is None
    drawn = config.model_copy(update={"model": config.model.model_copy(
        update={"select": config.model.select.model_copy(update={"mode": "random"})})})  # fmt: skip
    model.aggregator = MeanPool(1)
    assert explain(model, config.tasks, predict_bag(model, _bag(), drawn, pooled=True), "") is None
