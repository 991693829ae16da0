"""A bag scored in strips says what it says whole, to the last bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ips.bag import Bag
from ips.selection.ranking import Rank
from ips.selection.select import select
from pipeline.bags.shared import together
from pipeline.bags.sources import open_bag
from pipeline.inference.prediction import bag_scorer, load_model, predict_bag
from pipeline.inference.shards import Scores, Strip, borders, joined_scores, strip_logits, strip_scores
from tests.pipeline.small import small_config, store_slides, write_cohort, write_model

_RANKS: tuple[Rank, ...] = ("mean", "heads")


@given(st.integers(1, 300), st.integers(1, 40), st.integers(2, 50))
def test_strips_in_steps_hold_each_row_once_and_begin_at_a_step(rows: int, parts: int, step: int) -> None:
    found = borders(rows, parts, step)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    assert all(start % step == 0 < stop - start for start, stop in found)
    assert len(found) == min(-(-rows // step), parts)


@given(st.integers(1, 300), st.integers(1, 40))
def test_strips_hold_each_row_once_and_are_alike(rows: int, parts: int) -> None:
    found = borders(rows, parts)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    lengths = [stop - start for start, stop in found]
    assert len(found) == min(rows, parts)
    assert max(lengths) - min(lengths) <= 1


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Bag:
    folder = tmp_path_factory.mktemp("slides")
    ((_, source),) = store_slides(write_cohort(folder, ("yes",)), folder / "store", small_config())
    return open_bag(source, threads=1, augment=None)


@pytest.mark.parametrize(
    ("parts", "rank"), [(1, "mean"), (2, "mean"), (3, "mean"), (3, "heads"), (7, "mean"), (20, "mean")]
)
def test_logits_from_anywhere_give_the_prediction_of_one(bag: Bag, parts: int, rank: Rank, tmp_path: Path) -> None:
    plain = small_config().model.model_dump()
    config = small_config(model={**plain, "select": {"memory": 5, "chunk": 7, "rank": rank}})
    model, config = load_model(write_model(tmp_path, config))
    scorer = bag_scorer(model, config)
    assert scorer is not None
    strips = [Strip(bag, *ends) for ends in borders(len(bag), parts)]
    logits = [strip_logits(own, len(bag), scorer, config.model.select.chunk) for own in reversed(strips)]
    assert [len(part) for part in reversed(logits)] == [len(own) for own in strips]
    found = predict_bag(model, bag, config, scorer, scores=Scores(torch.cat(logits[::-1])))
    whole = predict_bag(model, bag, config, scorer)
    np.testing.assert_array_equal(found.values["tumour"], whole.values["tumour"])
    np.testing.assert_array_equal(found.attention, whole.attention)
    np.testing.assert_array_equal(found.selected, whole.selected)
    best = {kind: set(select(model, [bag], 5, 7, rank=kind).index[0].tolist()) for kind in _RANKS}
    assert set(found.selected) == best[rank]
    assert best["mean"] != best["heads"]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_all_patches_put_into_the_pool_is_the_same_in_strips(bag: Bag, parts: int, tmp_path: Path) -> None:
    plain = small_config()
    select = {**plain.model.select.model_dump(), "context": "all"}
    config = small_config(model={**plain.model.model_dump(), "select": select})
    model, _ = load_model(write_model(tmp_path, config))
    scorer = bag_scorer(model, config)
    assert scorer is not None
    strips = [Strip(bag, *ends) for ends in borders(len(bag), parts, 7)]
    scores = joined_scores([strip_scores(own, scorer, 7, context=True) for own in strips])
    found = predict_bag(model, bag, config, scorer, heads=True, pooled=True, scores=scores)
    whole = predict_bag(model, bag, config, scorer, heads=True, pooled=True)
    assert found.pooled is not None
    assert whole.pooled is not None
    assert torch.equal(found.pooled.values.values, whole.pooled.values.values)
    for name in ("attention", "selected", "heads"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    np.testing.assert_array_equal(found.logits["tumour"], whole.logits["tumour"])


def test_several_models_share_the_reading_of_a_strip(bag: Bag, tmp_path: Path) -> None:
    model, config = load_model(write_model(tmp_path, small_config()))
    scorer = bag_scorer(model, config)
    assert scorer is not None
    own, rows = Strip(bag, 3, 16), len(bag)
    alone = strip_logits(own, rows, scorer, 7)
    works = [partial(strip_logits, rows=rows, scorer=scorer, size=size) for size in (7, 4)]
    for found in together(own, works)[0]:
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, alone)
