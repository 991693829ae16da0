"""The mean of several models is that of what each gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cohort.table import CohortSlide
from pipeline.errors import SlideError, StageError
from pipeline.inference.ensemble import load_members, predict_mean
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.build import build_model
from pipeline.model.folder import read_config, save_model
from tests.pipeline.small import small_config, write_slide


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


def test_a_slide_that_cannot_be_used_keeps_its_reason(members: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    with pytest.raises(SlideError, match="empty.svs"):
        predict_mean(load_members(members), CohortSlide("s", str(tmp_path / "empty.svs"), "s", None, None, {}, {}))


def test_what_takes_one_model_says_what_an_ensemble_is(members: Path) -> None:
    with pytest.raises(StageError, match="it is an ensemble, .* name one of its models instead"):
        read_config(members.parent)
