"""The mean of several models is that of what each gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bags.sources import open_bag
from pipeline.cohort.table import CohortSlide
from pipeline.errors import SlideError, StageError
from pipeline.inference.ensemble import load_any, load_members, mean_of, predict_each, predict_mean, spread_of
from pipeline.inference.prediction import load_model, predict_bag, predict_slide
from pipeline.model.build import build_model
from pipeline.model.folder import read_config, save_model
from tests.pipeline.small import small_config, store_slides, write_cohort, write_slide


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one recipe with weights of their own, as a registered ensemble has them."""
    folder, config = tmp_path_factory.mktemp("ensemble") / "members", small_config()
    for number in range(3):
        place = folder / f"{number:02d}"
        place.mkdir(parents=True)
        torch.manual_seed(number)
        save_model(place, build_model(config, pretrained=False).state_dict(), config)
    return folder


def test_it_is_the_mean_of_its_models_to_the_last_bit(members: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "s.png", 3)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "s", None, None, {}, {})
    alone = [predict_slide(*load_model(place), slide).values["tumour"] for place in sorted(members.iterdir())]
    assert len({tuple(values.tolist()) for values in alone}) == 3
    found = predict_mean(load_members(members), slide)
    np.testing.assert_array_equal(found["tumour"], np.mean(alone, axis=0))


def test_attention_is_the_mean_too_and_the_spread_holds_every_model(members: Path, tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, ["yes"])
    ((_, source),) = store_slides(cohort, tmp_path / "store", small_config())
    bag = open_bag(source, threads=1, augment=None)
    models = load_any(members.parent)
    each = predict_each(models, [None] * 3, bag)
    alone = [predict_bag(model, bag, config) for model, config in models]
    tasks = small_config().tasks
    found, spread = mean_of(each, tasks), spread_of(each, tasks)
    np.testing.assert_allclose(found.attention, np.mean([one.attention for one in alone], axis=0), rtol=1e-6)
    assert set(found.selected) == {row for one in alone for row in one.selected.tolist()}
    assert (np.diff(found.attention[found.selected]) <= 0).all()
    values = np.array([one.values["tumour"] for one in alone])
    assert spread == {
        "tumour_no": (values[:, 0].min(), values[:, 0].max()),
        "tumour_yes": (values[:, 1].min(), values[:, 1].max()),
    }


def test_a_slide_that_cannot_be_used_keeps_its_reason(members: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    with pytest.raises(SlideError, match="empty.svs"):
        predict_mean(load_members(members), CohortSlide("s", str(tmp_path / "empty.svs"), "s", None, None, {}, {}))


def test_what_takes_one_model_says_what_an_ensemble_is(members: Path) -> None:
    with pytest.raises(StageError, match="it is an ensemble, .* name one of its models instead"):
        read_config(members.parent)


def test_models_that_disagree_about_what_they_say_are_not_averaged(tmp_path: Path) -> None:
    """Their numbers would be of each other's classes."""
    task = small_config().tasks[0].model_dump()
    for name, classes in (("00", ["no", "yes"]), ("01", ["yes", "no"])):
        (tmp_path / name).mkdir()
        config = small_config(tasks=[{**task, "classes": classes}])
        save_model(tmp_path / name, build_model(config, pretrained=False).state_dict(), config)
    with pytest.raises(StageError, match="01: tasks is "):
        load_members(tmp_path)
