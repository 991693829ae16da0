from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, StorageError
from pipeline.predictions.run import predict
from pipeline.storage.staging import Staging
from pipeline.view.outputs import Output, is_output
from pipeline.view.routes import parse
from pipeline.view.shown import ATTENTION
from pipeline.view.site import Site
from tests.pipeline.small import HEIGHT, WIDTH, small_config, write_model, write_slide
from tests.pipeline.view.made import grid, write_output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    corners, size = grid(700, 500, 101.3, 90.0)
    score = np.arange(len(corners)) / np.arange(len(corners)).mean()
    mask = np.zeros((50, 70), bool)
    mask[10:31, 20:41] = True
    mask[15:20, 25:30] = False
    slide = {
        "uri": "/slides/a.svs", "dimensions": (700, 500), "corners": corners, "size": size, "score": score,
        "selected": score > 1.5, "effect": score - 1, "mpp": 0.2527, "label": "tumour", "p": 0.8, "mask": mask,
    }  # fmt: skip
    return write_output(tmp_path, {"a": slide, "b": {"uri": "/slides/b.svs", "error": "b.svs: no such file"}})


def test_what_predict_wrote_is_read(out: Path) -> None:
    assert is_output(str(out))
    found = Output(str(out))
    assert found.name == "models:/demo/3"
    first, second = found.slides
    assert (first.slide_id, first.label, first.mpp, first.reason) == ("a", "tumour", 0.2527, None)
    (told,) = first.told
    assert (told.name, told.value) == ("tumour_lesion", 0.8)
    assert (told.low, told.high) == pytest.approx((0.7, 0.9))
    assert (second.told, second.reason) == ((), "b.svs: no such file")
    assert list(found.scales) == [ATTENTION, "effect_tumour_lesion"]
    assert found.scales[ATTENTION].top == 20
    assert "99.9% quantile" in found.scales[ATTENTION].stated
    assert found.scales["effect_tumour_lesion"].top == 1.5
    assert found.scales["effect_tumour_lesion"].unit == "what the output gains by the patch: log odds"


def test_patches_have_their_places_and_numbers(out: Path) -> None:
    found = Output(str(out))
    patches = found.patches(0)
    assert patches is not None
    corners, size = grid(700, 500, 101.3, 90.0)
    np.testing.assert_array_equal(np.stack([patches.squares.x, patches.squares.y], axis=1), corners)
    np.testing.assert_allclose(patches.squares.size, size, rtol=1e-6)
    assert patches.values[ATTENTION].mean() == pytest.approx(1)
    np.testing.assert_allclose(patches.values["effect_tumour_lesion"], patches.values[ATTENTION] - 1, atol=1e-5)
    assert found.patches(1) is None
    assert found.series(0) is None
    assert found.sentences(0) == ["Attention is not effect."]
    assert found.sentences(1) == []


def test_layers_stand_in_the_order_of_heads_and_outputs_not_of_the_alphabet(out: Path) -> None:
    place = out / "slides" / "a" / "slide.json"
    said, table = json.loads(place.read_text()), pq.read_table(out / "predictions.parquet")
    effects, heads = [f"effect_os_{end}" for end in (2, 12, 100)], [f"attention_os_{head}" for head in (0, 2, 10)]
    said["maps"] = {name: {"unit": "log odds"} for name in sorted([*effects, *heads, "score"])}
    place.write_text(json.dumps(said))
    for name in effects:
        table = table.append_column(name.removeprefix("effect_"), pa.array([0.5, None], pa.float64()))
    pq.write_table(table, out / "predictions.parquet")
    assert list(Output(str(out)).scales) == [ATTENTION, *heads, *effects]


def test_attention_of_a_head_is_shown_relative_to_uniform(out: Path) -> None:
    path = out / "slides" / "a" / "attention.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("attention_tumour_0", table["attention"]), path)
    said = json.loads((path.parent / "slide.json").read_text())
    said["maps"]["attention_tumour_0"] = {"unit": "share"}
    (path.parent / "slide.json").write_text(json.dumps(said))
    patches = Output(str(out)).patches(0)
    assert patches is not None
    np.testing.assert_allclose(patches.values["attention_tumour_0"], patches.values[ATTENTION], rtol=1e-5)


def test_tissue_is_what_its_outlines_enclose(out: Path) -> None:
    found = Output(str(out))
    mask = found.tissue(0)
    assert mask is not None
    assert mask.shape == (500, 700)
    meant = np.zeros((500, 700), bool)
    meant[100:310, 200:410] = True
    meant[150:200, 250:300] = False
    assert (mask != meant).sum() < 2 * (2 * 420 + 200)  # a px along the rings
    assert found.tissue(1) is None


def test_what_is_damaged_is_named(out: Path) -> None:
    found = Output(str(out))
    path = out / "slides" / "a" / "attention.parquet"
    table = pq.read_table(path)
    holed = np.where(np.arange(len(table)) == 3, np.nan, table["score"].to_numpy())
    pq.write_table(table.drop_columns(["score"]).append_column("score", pa.array(holed)), path)
    with pytest.raises(DamagedError, match=r"attention has values that are no numbers"):
        found.patches(0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedError, match=r"attention\.parquet.*run predict again"):
        found.patches(0)
    (out / "slides" / "a" / "slide.json").write_text("[]")
    with pytest.raises(StorageError, match=r"slide\.json"):
        Output(str(out))
    table = pq.read_table(out / "predictions.parquet").drop_columns(["folder"])
    pq.write_table(table, out / "predictions.parquet")
    with pytest.raises(DamagedError, match="no column folder"):
        Output(str(out))


def test_a_folder_of_other_things_is_no_output(tmp_path: Path) -> None:
    assert not is_output(str(tmp_path))


@pytest.mark.slow
def test_what_predict_writes_today_is_shown(tmp_path: Path) -> None:
    config = small_config()
    (tmp_path / "model").mkdir()
    write_slide(tmp_path / "a.png", 0)
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    asked = [str(tmp_path / "a.png"), str(tmp_path / "bad.svs")]
    predict(str(write_model(tmp_path / "model", config)), asked, None, tmp_path / "out", tracking_uri="unused")
    found = Output(str(tmp_path / "out"))
    assert found.name == str(tmp_path / "model")
    assert [told.name for told in found.slides[0].told] == ["tumour_no", "tumour_yes"]
    assert found.slides[0].reason is None
    assert "bad.svs" in str(found.slides[1].reason)
    patches = found.patches(0)
    assert patches is not None
    assert set(patches.values) == set(found.scales)
    assert {ATTENTION, "effect_tumour_yes"} <= set(found.scales)
    assert patches.values[ATTENTION].mean() == pytest.approx(1, abs=1e-5)
    assert patches.selected.sum() == 5
    assert "selected of" in found.sentences(0)[0]
    mask = found.tissue(0)
    assert mask is not None
    assert 0 < mask.mean() < 1
    with closing(Site([found], Staging())) as site:
        told = json.loads(site.detailed(0))
        assert (told["width"], told["height"]) == (WIDTH, HEIGHT)
        layers = json.loads(site.listed())["layers"]
        for number in told["layers"]:
            route = parse(f"/{site.tag}/0/layer/{number}/0/0/0")
            assert route is not None
            assert site.picture(route).data[1:4] == b"PNG", layers[number]


def test_columns_that_are_marked_are_the_ends(out: Path) -> None:
    """Whatever others are called, as classes `a`, `a_low` and `a_high` beside a task with intervals."""
    table = pq.read_table(out / "predictions.parquet")
    for name in ("grade_a", "grade_a_low", "grade_a_high"):
        table = table.append_column(name, pa.array([0.25, None], pa.float64()))
    pq.write_table(table, out / "predictions.parquet")
    told = {one.name: one for one in Output(str(out)).slides[0].told}
    assert list(told) == ["tumour_lesion", "grade_a", "grade_a_low", "grade_a_high"]
    assert (told["tumour_lesion"].interval, told["tumour_lesion"].tested) == ("calibrated", 40)


def test_a_class_may_be_called_low_or_high(out: Path) -> None:
    """Also in a file of before, which marks none."""
    table = pq.read_table(out / "predictions.parquet").replace_schema_metadata()
    table = table.cast(pa.schema([one.remove_metadata() for one in table.schema]))
    for name in ("risk_low", "risk_high", "grade_a", "grade_a_low"):
        table = table.append_column(name, pa.array([0.25, None], pa.float64()))
    pq.write_table(table, out / "predictions.parquet")
    told = {one.name: (one.low, one.high) for one in Output(str(out)).slides[0].told}
    assert list(told) == ["tumour_lesion", "risk_low", "risk_high", "grade_a", "grade_a_low"]
    assert told["tumour_lesion"] == pytest.approx((0.7, 0.9))
    assert told["risk_low"] == told["grade_a"] == (None, None)


def test_attention_of_a_head_is_relative_to_all_slides_of_a_patient(out: Path) -> None:
    folder = out / "slides" / "a"
    table, said = pq.read_table(folder / "attention.parquet"), json.loads((folder / "slide.json").read_text())
    pq.write_table(table.append_column("attention_tumour_0", table["attention"]), folder / "attention.parquet")
    said |= {"patient": {"n_patches": 3 * len(table)}, "maps": {**said["maps"], "attention_tumour_0": {}}}
    (folder / "slide.json").write_text(json.dumps(said))
    patches = Output(str(out)).patches(0)
    assert patches is not None
    wanted = 3 * len(table) * table["attention"].to_numpy()
    np.testing.assert_allclose(patches.values["attention_tumour_0"], wanted, rtol=1e-6)
