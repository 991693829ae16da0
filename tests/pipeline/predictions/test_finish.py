from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.predictions.finish import Finishing, caption
from pipeline.predictions.run import predict
from pipeline.storage.files import json_bytes
from tests.pipeline.small import small_config, write_model, write_slide

OUTPUTS = ["tumour_no", "tumour_yes"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    write_slide(folder / "a.png", 3)
    predict(str(write_model(folder, small_config())), [str(folder / "a.png")], None, folder / "out", tracking_uri="no")
    return folder / "out" / "slides" / "a"


def test_a_picture_in_these_colours_is_kept_and_in_others_drawn_anew(done: Path) -> None:
    facts = json.loads((done / "slide.json").read_text())
    before = (done / "overlay.png").stat().st_mtime_ns
    Finishing(facts["colours"], OUTPUTS).worker()(str(done))
    assert (done / "overlay.png").stat().st_mtime_ns == before
    others = {"score": {"low": 1.0, "high": 7.0, "quantile": 0.9}}
    first = (done / "overlay.png").read_bytes()
    Finishing(others, OUTPUTS).finish(str(done))
    assert (done / "overlay.png").read_bytes() != first
    assert json.loads((done / "slide.json").read_text())["colours"] == others
    Finishing(facts["colours"], OUTPUTS).finish(str(done))
    assert (done / "overlay.png").read_bytes() == first
    assert json.loads((done / "slide.json").read_text()) == facts


def test_a_caption_names_slide_outputs_model_and_map(done: Path) -> None:
    facts = json.loads((done / "slide.json").read_text())
    first, values, model, share = caption(facts, OUTPUTS)
    assert first == "a"
    assert values.startswith("tumour_no 0.")
    assert model == f"{facts['model']['source']}; score/1"
    assert "of the attention is in the 5 selected of 20 patches" in share


def test_a_caption_has_the_outputs_in_the_models_order_which_json_loses(done: Path) -> None:
    facts = json.loads((done / "slide.json").read_text())
    columns = [f"os_{end}" for end in (12, 2, 100)]
    values = {name: place / 4 for place, name in enumerate(columns)}
    read = json.loads(json_bytes({**facts, "values": values}))
    assert list(read["values"]) != columns
    assert caption(read, columns)[1] == "os_12 0.000, os_2 0.250, os_100 0.500"
