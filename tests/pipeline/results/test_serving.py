from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.bags import patch_bag
from pipeline.cohort.table import CohortSlide
from pipeline.inference.prediction import load_model, predict_slide, predict_together
from pipeline.model.build import build_model
from pipeline.model.calibration import CALIBRATION, Cases, calibration_json, intervals
from pipeline.model.folder import MEMBERS, SEEN, TISSUE_NETWORK, Seen, save_model
from pipeline.predictions.run import predict as write_predictions
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.small import small_config, write_model, write_sections, write_slide

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*inferred as AnyType")  # MLflow's of its own code, at this import
    from mlflow.exceptions import MlflowException
    from mlflow.models.utils import _enforce_params_schema
    from mlflow.pyfunc import PythonModelContext
    from mlflow.types.schema import DataType, ParamSchema, ParamSpec

    from pipeline.results.serving import SlideModel
    from pipeline.tracking.package import _signature, gather_artifacts, gather_members


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> PythonModelContext:
    folder = write_model(tmp_path_factory.mktemp("model"), small_config())
    return PythonModelContext({"weights": str(folder / "weights.safetensors")}, None)


def test_rows_come_back_in_order_and_a_bad_slide_keeps_its_reason(
    context: PythonModelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SlideModel()
    model.load_context(context)
    write_slide(tmp_path / "b.png", 1)
    write_slide(tmp_path / "a.png", 2)
    (tmp_path / "empty.svs").touch()
    monkeypatch.chdir(tmp_path)
    uris = [str(tmp_path / "b.png"), "empty.svs", "a.png", "gcs://bucket/x.svs", None]
    answer = model.predict(context, pd.DataFrame({"uri": uris, "mpp": [None, 0.5, 0.25, None, None]}))
    assert list(answer.columns) == ["uri", "tumour_no", "tumour_yes", "error"]
    assert answer["uri"].tolist()[:4] == uris[:4]
    assert answer["uri"].isna().tolist() == [False] * 4 + [True]
    assert answer["tumour_no"][0] + answer["tumour_yes"][0] == pytest.approx(1.0)
    assert answer["tumour_yes"].isna().tolist() == [False, True, False, True, True]
    assert "empty.svs" in answer["error"][1]
    assert answer["error"].isna().tolist() == [True, False, True, False, False]
    assert "gcs://bucket/x.svs" in answer["error"][3]
    assert "uri is missing" in answer["error"][4]


def test_a_series_is_the_image_that_is_predicted(context: PythonModelContext, tmp_path: Path) -> None:
    model = SlideModel()
    model.load_context(context)
    path = write_sections(tmp_path / "two.tif")
    answer = model.predict(context, pd.DataFrame({"uri": [str(path)] * 4, "series": [0, 1, None, 0.5]}))
    assert answer["error"].isna().tolist() == [True, True, False, False]
    assert answer["tumour_yes"][0] != answer["tumour_yes"][1]
    assert "several images could be the slide: series 0 of 211 x 157 px, series 1 of 211 x 157 px" in answer["error"][2]
    assert answer["error"][3] == "series 0.5 is no whole number from 0"


def test_rows_of_one_patient_have_one_answer(tmp_path: Path) -> None:
    config = small_config(cohort={"uri": "c.csv", "bag": "patient"})
    model = SlideModel()
    weights = write_model(tmp_path, config) / "weights.safetensors"
    model.load_context(PythonModelContext({"weights": str(weights)}, None))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        write_slide(path, number)
    slides = [CohortSlide(str(path), str(path), "p", None, None, {}, {}) for path in paths]
    uris, patients = [*map(str, paths), "absent.svs"], ["a", "b", "a", "b"]
    answer = model.predict(None, pd.DataFrame({"uri": uris, "patient": patients}))
    assert answer["uri"].tolist() == uris
    assert answer["error"].isna().tolist() == [True, False, True, False]
    assert answer["tumour_yes"][0] == answer["tumour_yes"][2]
    together = predict_together(model.model, config, [slides[0], slides[2]])
    assert answer["tumour_yes"][0] == together[0].values["tumour"][1]
    assert "absent.svs" in answer["error"][1] == answer["error"][3]
    maps = model.predict(None, pd.DataFrame({"uri": uris[::2], "patient": "a"}), {"attention": True, "explain": True})
    sums = [sum(patches["attention"]) for patches in maps["patches"]]
    assert sums[0] != pytest.approx(sums[1])
    assert sum(sums) == pytest.approx(1, abs=1e-5)
    assert maps["curves"][0] == maps["curves"][1]
    assert [len(patches["effect_tumour_yes"]) for patches in maps["patches"]] == [20, 20]
    alone = model.predict(None, pd.DataFrame({"uri": uris[:2], "patient": [None, None]}))
    assert alone["error"].isna().all()
    assert alone["tumour_yes"][0] != alone["tumour_yes"][1]


def test_rows_of_one_specimen_have_one_answer(tmp_path: Path) -> None:
    config = small_config(cohort={"uri": "c.csv", "bag": "patient", "specimen": "block"})
    model, weights = SlideModel(), write_model(tmp_path, config) / "weights.safetensors"
    model.load_context(PythonModelContext({"weights": str(weights)}, None))
    for number in range(4):
        write_slide(tmp_path / f"{number}.png", number)
    rows = {"patient": ["a", "a", "b", "a"], "specimen": ["x", "y", "x", "x"]}
    uris = [str(tmp_path / f"{number}.png") for number in range(4)]
    answer = model.predict(None, pd.DataFrame({"uri": uris, **rows}))["tumour_yes"].tolist()
    assert answer[0] == answer[3]
    assert len(set(answer)) == 3
    slides = [CohortSlide(uri, uri, "a", None, None, {}, {}) for uri in (uris[0], uris[3])]
    assert answer[0] == predict_together(model.model, config, slides)[0].values["tumour"][1]
    alone = model.predict(None, pd.DataFrame({"uri": uris, "patient": rows["patient"]}))["tumour_yes"]
    assert len(set(alone)) == 4  # no specimen is said


def test_microns_that_are_missing_are_asked_for_in_their_column(tmp_path: Path) -> None:
    folder = write_model(tmp_path, small_config(tiling={"patch_px": 32, "mpp": 0.5, "min_tissue": 0.5}))
    write_slide(tmp_path / "a.png", 2)
    model = SlideModel()
    model.load_context(PythonModelContext({"weights": str(folder / "weights.safetensors")}, None))
    (error,) = model.predict(None, pd.DataFrame({"uri": [str(tmp_path / "a.png")]}))["error"]
    fact = "the file states no microns per px (of a plain image its resolution is not taken)"
    assert error == f"{fact}; give it in the column mpp"


def test_an_ensemble_answers_with_the_mean_of_its_models(tmp_path: Path) -> None:
    places = [tmp_path / "members" / name for name in ("00", "01")]
    for seed, place in enumerate(places):
        place.mkdir(parents=True)
        torch.manual_seed(seed)
        save_model(place, build_model(small_config(), pretrained=False).state_dict(), small_config())
    write_slide(tmp_path / "a.png", 2)
    asked = pd.DataFrame({"uri": [str(tmp_path / "a.png")]})

    def answer(artifacts: dict[str, str]) -> float:
        model = SlideModel()
        model.load_context(PythonModelContext(artifacts, None))
        return float(model.predict(None, asked)["tumour_yes"][0])

    alone = [answer({"weights": str(place / "weights.safetensors")}) for place in places]
    assert alone[0] != alone[1]
    assert answer({"members": str(tmp_path / "members")}) == sum(alone) / 2


def test_no_rows_give_an_empty_answer(context: PythonModelContext) -> None:
    model = SlideModel()
    model.load_context(context)
    assert model.predict(context, pd.DataFrame({"uri": []})).empty


@pytest.fixture
def model(context: PythonModelContext) -> SlideModel:
    model = SlideModel()
    model.load_context(context)
    return model


def test_an_answer_is_json(context: PythonModelContext, model: SlideModel, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.png", 2)
    answer = model.predict(context, pd.DataFrame({"uri": [str(tmp_path / "a.png"), "none.png", None]}))
    good, bad, missing = json.loads(json.dumps(answer.to_dict(orient="records"), allow_nan=False))
    assert good["error"] is None
    assert good["tumour_no"] + good["tumour_yes"] == pytest.approx(1.0)
    assert (bad["tumour_no"], bad["tumour_yes"]) == (None, None)
    assert missing["uri"] is None


def test_no_answer_holds_a_credential(context: PythonModelContext, model: SlideModel) -> None:
    uris = ["s3://KEY:my Pa55@b/a.svs", "https://h/a.svs?X-Amz-Signature=Pa55"]
    answer = model.predict(context, pd.DataFrame({"uri": uris}))
    assert "Pa55" not in str(answer.to_dict())
    assert answer["uri"].tolist() == ["s3://***@b/a.svs", "https://h/a.svs?X-Amz-Signature=***"]
    assert answer["error"].str.contains("AWS_SECRET_ACCESS_KEY").all()


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    config = small_config()
    weights = build_model(config).state_dict()
    broken = {name: value * float("nan") if name.startswith("heads") else value for name, value in weights.items()}
    save_model(tmp_path, broken, config)
    context = PythonModelContext({"weights": str(tmp_path / "weights.safetensors")}, None)
    model = SlideModel()
    model.load_context(context)
    write_slide(tmp_path / "a.png", 2)
    (row,) = model.predict(context, pd.DataFrame({"uri": [str(tmp_path / "a.png")]})).to_dict(orient="records")
    assert row["tumour_yes"] is None
    assert "no finite numbers" in row["error"]


def test_only_allowed_files_are_read(
    context: PythonModelContext, model: SlideModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.png", 2)
    write_slide(tmp_path / "out.png", 2)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    monkeypatch.setenv("IPS_ALLOWED_ROOTS", str(tmp_path / "in"))
    uris = [str(tmp_path / name) for name in ("in/a.png", "in/link.png", "out.png", "in/../out.png", "absent.png")]
    answer = model.predict(context, pd.DataFrame({"uri": uris}))
    assert answer["error"].isna().tolist() == [True, False, False, False, False]
    assert answer["error"][1:].str.contains("this host does not serve files from there").all()


def test_a_request_has_limits(
    context: PythonModelContext, model: SlideModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slide(tmp_path / "a.png", 2)
    slides = pd.DataFrame({"uri": [str(tmp_path / "a.png")] * 3})
    monkeypatch.setenv("IPS_MAX_ROWS", "2")
    with pytest.raises(MlflowException, match=r"3 slides in one request, and 2 are allowed \(IPS_MAX_ROWS\)"):
        model.predict(context, slides)
    monkeypatch.setenv("IPS_MAX_ROWS", "3")
    monkeypatch.setenv("IPS_MAX_SECONDS", "0.001")
    answer = model.predict(context, slides)
    assert answer["error"].isna().tolist() == [True, False, False]
    assert answer["error"][1:].str.contains("not begun: the slides before it took the 0.001 s").all()


def test_what_params_ask_for_are_columns(context: PythonModelContext, model: SlideModel, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.png", 2)
    rows = pd.DataFrame({"uri": [str(tmp_path / "a.png"), "none.png"]})
    plain = model.predict(context, rows)
    answer = model.predict(context, rows, {"attention": True, "top_k": 3, "explain": True})
    assert list(answer.columns) == ["uri", "tumour_no", "tumour_yes", "patch", "patches", "top", "curves", "error"]
    assert answer[list(plain.columns)].equals(plain)
    good, bad = json.loads(json.dumps(answer.to_dict(orient="records"), allow_nan=False))
    assert [bad[name] for name in ("patch", "patches", "top", "curves")] == [None] * 4
    assert good["patch"] == 32.0
    maps = good["patches"]
    assert set(maps) == {"x", "y", "attention", "effect_tumour_no", "effect_tumour_yes"}
    assert {len(values) for values in maps.values()} == {20}
    assert sum(maps["attention"]) == pytest.approx(1, abs=1e-5)
    assert [one["attention"] for one in good["top"]] == sorted(maps["attention"], reverse=True)[:3]
    for one in good["top"]:
        assert {name: maps[name][one["row"]] for name in maps} == {name: one[name] for name in maps}
    assert good["curves"]["fraction"][0] == 0
    assert list(model.predict(context, rows, {"top_k": 1}).columns)[3:5] == ["patch", "top"]
    with pytest.raises(MlflowException, match="top_k is -1; give a number from 0"):
        model.predict(context, rows, {"top_k": -1})


def test_intervals_are_null_where_the_model_has_none(
    context: PythonModelContext, model: SlideModel, tmp_path: Path
) -> None:
    write_slide(tmp_path / "a.png", 2)
    rows, ends = pd.DataFrame({"uri": [str(tmp_path / "a.png"), "none.png"]}), ["tumour_yes_low", "tumour_yes_high"]
    assert model.predict(context, rows, {"intervals": True})[ends].isna().all(axis=None)
    folder = write_model(tmp_path, small_config())
    cases = {"tumour": Cases(np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[1.0, 0.0], [0.0, 1.0]]))}
    (folder / CALIBRATION).write_text(json.dumps(calibration_json(cases)))
    other = SlideModel()
    other.load_context(PythonModelContext(gather_artifacts(folder, small_config(), tmp_path), None))
    answer = other.predict(context, rows, {"intervals": True})
    assert list(answer.columns) == ["uri", "tumour_no", "tumour_yes", "tumour_no_low", "tumour_no_high", *ends, "error"]
    assert set(answer.columns) <= set(_signature(small_config()).outputs.input_names())
    assert answer[ends].to_numpy().tolist() == [[0.0, 1.0], [None, None]]  # of two cases


def test_intervals_of_a_slide_that_is_known_are_those_of_predict(tmp_path: Path) -> None:
    """One that it has learned from has none, and one of the test is told without itself: known by what was read."""
    folder, slides = write_model(tmp_path, small_config()), [str(tmp_path / f"{n}.png") for n in range(3)]
    for number, path in enumerate(slides):
        write_slide(Path(path), number)
    write_predictions(str(folder), slides, None, tmp_path / "before", tracking_uri="unused")
    keys = [json.loads((tmp_path / f"before/slides/{n}/slide.json").read_text())["key"] for n in range(3)]
    said, came = np.linspace(0.0, 1.0, 21), np.arange(21) % 2.0
    said[10] = pq.read_table(tmp_path / "before" / "predictions.parquet")["tumour_yes"][1].as_py()
    names = [(Seen.patient(f"p{n}"), keys[1] if n == 10 else f"key{n}") for n in range(21)]
    cases = Cases(np.stack([1 - said, said], axis=1), np.stack([1 - came, came], axis=1), tuple(names))
    (folder / CALIBRATION).write_text(json.dumps(calibration_json({"tumour": cases})))
    (folder / SEEN).write_text(json.dumps(Seen(frozenset({keys[0]}), frozenset({Seen.patient("Ann")})).as_json()))
    write_predictions(str(folder), slides, None, tmp_path / "out", tracking_uri="unused")
    ends = ["tumour_yes_low", "tumour_yes_high"]
    expected = pq.read_table(tmp_path / "out" / "predictions.parquet").select(ends).to_pylist()
    model = SlideModel()
    model.load_context(PythonModelContext(gather_artifacts(folder, small_config(), tmp_path), None))
    answer = model.predict(None, pd.DataFrame({"uri": slides}), {"intervals": True})
    assert answer[ends].to_dict("records") == expected
    assert expected[0] == dict.fromkeys(ends)
    own, new = (intervals(small_config().tasks, {"tumour": one}, {"tumour_no": 1 - said[10], "tumour_yes": said[10]})
                ["tumour_yes"] for one in (cases.without([keys[1]]), cases))  # fmt: skip
    assert tuple(expected[1].values()) == own != new
    assert None not in expected[2].values()
    whose = pd.DataFrame({"uri": slides[2:] * 2, "patient": ["Ann", "p3"]})
    assert model.predict(None, whose, {"intervals": True})[ends[0]].isna().tolist() == [True, False]


def test_a_bag_is_known_by_each_of_its_slides(tmp_path: Path) -> None:
    config = small_config(cohort={"uri": "c.csv", "bag": "patient"})
    folder, slides = write_model(tmp_path, config), [str(tmp_path / f"{n}.png") for n in range(2)]
    for number, path in enumerate(slides):
        write_slide(Path(path), number)
    model = SlideModel()
    model.load_context(PythonModelContext(gather_artifacts(folder, config, tmp_path), None))
    found = predict_together(model.model, config, [CohortSlide(uri, uri, "x", None, None, {}, {}) for uri in slides])
    assert len({found[0].key, *(one.own_key for one in found)}) == 3
    said = np.array([[0.9, 0.1], [0.1, 0.9]])
    rows, asked = pd.DataFrame({"uri": slides, "patient": "new name"}), {"intervals": True}
    answers = ((found[0].own_key, [True, True]), (found[1].content, [True, True]), ("another", [False, False]))
    for known, expected in answers:
        model.seen = Seen(frozenset({known}), frozenset())
        model.cases = {"tumour": Cases(said, np.round(said), ((found[0].key,), ("b",)))}
        answer = model.predict(None, rows, asked)
        assert answer["tumour_yes_low"].isna().tolist() == expected
    model.cases = {"tumour": model.cases["tumour"].without([found[0].key])}  # of which it is told anyhow
    again = model.predict(None, rows, asked)
    assert again.to_dict("records") == answer.to_dict("records")


def test_a_patch_is_decoded_once_whatever_is_asked_for(
    context: PythonModelContext, model: SlideModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slide(tmp_path / "a.png", 2)
    rows, counts, decode = pd.DataFrame({"uri": [str(tmp_path / "a.png")] * 3}), Counter[int](), patch_bag._decode_all

    def counted(jobs: Any) -> None:
        counts.update(job.row for job in jobs)
        decode(jobs)

    monkeypatch.setattr(patch_bag, "_decode_all", counted)
    answer = model.predict(context, rows, {"attention": True, "top_k": 5, "explain": True})
    assert {len(patches["x"]) for patches in answer["patches"]} == {20}
    assert sorted(counts.values()) == [3] * 15 + [6] * 5  # of three slides; the M winners are encoded once more
    whole = counts.copy()
    counts.clear()
    model.predict(context, rows)
    assert counts == whole


def test_params_that_are_no_param_are_refused_where_mlflow_drops_them(
    model: SlideModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of other models in the same process are MLflow's own matter."""
    schema = _signature(small_config()).params
    assert _enforce_params_schema({"top_k": 2}, schema) == {
        **dict.fromkeys(["attention", "explain", "intervals"], False),
        "top_k": 2,
    }
    said = r"params \['topk'\] are unknown; there are attention, top_k, explain and intervals"
    with caplog.at_level(logging.ERROR, "mlflow"), pytest.raises(MlflowException, match=said):
        _enforce_params_schema({"topk": 3, "explain": True}, schema)
    other = ParamSchema([ParamSpec("temperature", DataType.double, default=0.0)])
    assert _enforce_params_schema({"topk": 3}, other) == {"temperature": 0.0}


@pytest.mark.parametrize("kind", ["model", "ensemble"])
def test_another_host_has_the_tissue_network_and_names_it_when_it_was_changed(kind: str, tmp_path: Path) -> None:
    for name in ("trainer", "scratch", "host"):
        (tmp_path / name).mkdir()
    network = scripted(Toy(), tmp_path / "trainer" / "toy.pt")
    config = small_config(tiling=small_tiling(network))
    folder = write_model(tmp_path / "trainer", config)
    write_slide(tmp_path / "a.png", 5)
    slide = CohortSlide("a", str(tmp_path / "a.png"), "p", None, 0.5, {}, {})
    expected = predict_slide(*load_model(folder), slide)
    if kind == "ensemble":
        gather_members([folder, folder], config, tmp_path / "scratch")
        shutil.copytree(tmp_path / "scratch" / MEMBERS, tmp_path / "host" / MEMBERS)
        artifacts = {MEMBERS: MEMBERS}
    else:
        for path in gather_artifacts(folder, config, tmp_path / "scratch").values():
            shutil.copy(path, tmp_path / "host")
        artifacts = {"weights": "weights.safetensors"}
    shutil.rmtree(tmp_path / "trainer")
    shutil.copytree(tmp_path / "host", tmp_path / "changed")
    (packed,) = (tmp_path / "changed").rglob(TISSUE_NETWORK)
    scripted(Toy(limit=30.0), packed)

    def served(host: str) -> SlideModel:
        found = {name: str(tmp_path / host / path) for name, path in artifacts.items()}
        (model := SlideModel()).load_context(PythonModelContext(found, None))
        return model

    model = served("host")
    assert model.config.tiling.fingerprint() == config.tiling.fingerprint()
    rows = pd.DataFrame({"uri": [slide.uri, "absent.png"], "mpp": 0.5})
    good, absent = model.predict(None, rows).to_dict("records")
    assert (good["error"], good["tumour_yes"]) == (None, pytest.approx(expected.values["tumour"][1], abs=1e-6))
    assert "absent.png" in absent["error"]

    changed, absent = served("changed").predict(None, rows).to_dict("records")
    assert changed["error"].startswith(f"tiling.tissue_model.sha256: {packed} has ")
    assert changed["error"].endswith("it is another file, or was changed; give this where it is right")
    assert (changed["tumour_yes"], "absent.png" in absent["error"]) == (None, True)
