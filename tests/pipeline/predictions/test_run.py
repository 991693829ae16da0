from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import csv

from pipeline.bags import unseen
from pipeline.bags.sources import open_bag
from pipeline.bags.unseen import featured
from pipeline.config.recipe import ClusterConfig, Config
from pipeline.errors import ConfigError, StageError, TrackingError
from pipeline.inference.prediction import load_model, predict_bag
from pipeline.model.build import build_model
from pipeline.model.calibration import CALIBRATION, Cases, calibration_json, venn_abers
from pipeline.model.folder import TISSUE_NETWORK, save_model
from pipeline.predictions import run as run_module
from pipeline.predictions.large import Shard
from pipeline.predictions.output import safe_name
from pipeline.predictions.run import How, predict
from pipeline.predictions.slide import Predicting
from pipeline.storage.files import read_bytes
from pipeline.storage.tree import upload_tree
from pipeline.store.catalogue import Catalogue, View
from pipeline.tracking.registry import promote, register_model
from pipeline.tracking.tracker import open_tracking
from pipeline.view.outputs import Output
from tests.pipeline.bags.test_embed import settings
from tests.pipeline.formats.test_feature_files import VECTORS, N, trident
from tests.pipeline.ingest.test_cohorts import given_config
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.small import (
    HEIGHT,
    WIDTH,
    small_config,
    store_slides,
    write_cohort,
    write_model,
    write_sections,
    write_slide,
)
from tests.s3 import S3Server

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning", "ignore:Operation with range:DeprecationWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), small_config())


def _slides(tmp_path: Path) -> list[str]:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "other" / "a.png"]
    for seed, path in enumerate(paths):
        write_slide(path, seed)
    (tmp_path / "bad.svs").write_bytes(b"not a slide")
    return [str(path) for path in (*paths, tmp_path / "bad.svs")]


def _files(folder: Path) -> dict[str, bytes]:
    """All files of a batch but its lease."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del found["predict.lease"]
    return found


def test_each_slide_has_its_folder_and_a_bad_one_fails_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = predict(str(folder), _slides(tmp_path), None, out, tracking_uri="unused")
    json.dumps(result)
    assert list(result["failed"]) == ["bad"]
    assert result["predicted_now"] == 3

    table = csv.read_csv(out / "predictions.csv").to_pydict()
    assert table["slide_id"] == ["a", "a-2", "bad"]
    assert table["folder"] == ["slides/a", "slides/a-2", ""]
    assert table["tumour_no"][0] + table["tumour_yes"][0] == pytest.approx(1.0)
    assert table["tumour_yes"][2] is None
    assert "bad.svs" in table["error"][2]
    assert table["status"] == ["predicted", "predicted", "failed"]
    assert table["reason"] == ["", "", "not-a-slide"]
    assert (table["width"], table["height"]) == ([WIDTH, WIDTH, None], [HEIGHT, HEIGHT, None])
    assert table["n_patches"] == [20, 20, 0]
    assert pq.read_table(out / "predictions.parquet").column_names == list(table)

    assert sorted(path.name for path in (out / "slides").iterdir()) == ["a", "a-2"]
    names = [
        "attention.parquet",
        "contact.png",
        "overlay.png",
        "slide.json",
        "thumbnail.jpg",
        "tissue.geojson",
        "top.geojson",
    ]
    assert sorted(path.name for path in (out / "slides" / "a").iterdir()) == names
    maps = pq.read_table(out / "slides" / "a" / "attention.parquet")
    assert sum(maps["attention"].to_pylist()) == pytest.approx(1.0, abs=1e-5)
    assert sum(maps["selected"].to_pylist()) == 5
    facts = json.loads((out / "slides" / "a" / "slide.json").read_text())
    assert json.loads(maps.schema.metadata[b"ips.maps"]) == facts["maps"]
    assert set(facts["maps"]) == {"attention", "score", "effect_tumour_no", "effect_tumour_yes"}
    page = (out / "summary.html").read_text()
    assert "2 of 3 slides predicted" in page
    assert "slides/a-2/overlay.png" in page


def test_what_stands_is_kept_and_a_killed_batch_ends_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    slides = _slides(tmp_path)
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    predict(str(folder), slides, None, whole, tracking_uri="unused")
    (grown / "slides" / "a-2").mkdir(parents=True)
    (grown / "slides" / "a-2" / "attention.parquet").write_bytes(b"half a fi")
    predict(str(folder), slides[:1], None, grown, tracking_uri="unused")  # the colours are those of one slide
    assert predict(str(folder), slides, None, grown, tracking_uri="unused")["predicted_now"] == 2
    assert _files(grown) == _files(whole)
    before = {path: path.stat().st_mtime_ns for path in (grown / "slides").rglob("*") if path.is_file()}
    assert predict(str(folder), slides, None, grown, tracking_uri="unused")["predicted_now"] == 1  # the bad one
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert _files(grown) == _files(whole)
    (grown / "slides" / "a" / "slide.json").write_text("{")
    write_slide(Path(slides[1]), 7)  # another picture
    assert predict(str(folder), slides, None, grown, tracking_uri="unused")["predicted_now"] == 3
    assert _files(grown)["slides/a/attention.parquet"] == _files(whole)["slides/a/attention.parquet"]
    assert _files(grown)["slides/a-2/attention.parquet"] != _files(whole)["slides/a-2/attention.parquet"]


def test_slides_of_a_batch_share_their_colours_and_heads_and_patches_come_where_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    plain, more = tmp_path / "plain", tmp_path / "more"
    slides = _slides(tmp_path)[:2]
    predict(str(folder), slides, None, plain, tracking_uri="unused")
    found = predict(str(folder), slides, None, more, tracking_uri="unused", how=How(heads=True, all_patches=True))
    assert found["predicted_now"] == 2
    both = [json.loads((plain / "slides" / name / "slide.json").read_text()) for name in ("a", "a-2")]
    assert both[0]["colours"] == both[1]["colours"]
    assert both[0]["histograms"] != both[1]["histograms"]
    maps, each = (pq.read_table(out / "slides" / "a" / "attention.parquet") for out in (plain, more))
    assert set(each.column_names) - set(maps.column_names) == {"attention_tumour_0", "attention_tumour_1"}
    heads = np.stack([each[f"attention_tumour_{head}"].to_numpy() for head in range(2)])
    np.testing.assert_allclose(heads.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(heads.mean(axis=0), maps["attention"].to_numpy(), atol=1e-6)
    assert len(json.loads(gzip.decompress((more / "slides" / "a" / "all.geojson.gz").read_bytes()))["features"]) == 20


def test_a_store_and_a_reading_on_the_way_give_the_same(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the store is looked up once, however many slides are asked for."""
    config, cohort = small_config(), write_cohort(tmp_path, [None, None])
    store_slides(cohort, tmp_path / "store", config)
    slides = [slide.uri for slide in cohort.slides]
    passed, stored = tmp_path / "passed", tmp_path / "stored"
    predict(str(folder), slides, None, passed, tracking_uri="unused")
    looks, look = list[str](), Catalogue.read

    def watched(catalogue: Catalogue) -> View:
        looks.append(catalogue.uri)
        return look(catalogue)

    monkeypatch.setattr(Catalogue, "read", watched)
    predict(str(folder), slides, None, stored, tracking_uri="unused", how=How(store=str(tmp_path / "store")))
    assert len([uri for uri in looks if uri.startswith(str(tmp_path / "store"))]) == 1
    assert _files(passed) == _files(stored)
    assert "holds no slides" not in caplog.text
    predict(str(folder), slides, None, passed, tracking_uri="unused", how=How(store=str(tmp_path / "nowhere")))
    assert f"--store {tmp_path / 'nowhere'} holds no slides as this model takes them" in caplog.text


def test_folders_and_prefixes_to_a_bucket(
    folder: Path, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket = server.bucket("predicted")
    (tmp_path / "set" / "below").mkdir(parents=True)
    write_sections(tmp_path / "set" / "one.tif")
    write_slide(tmp_path / "set" / "below" / "ignored.png", 3)
    write_sections(tmp_path / "set" / "below" / "two.tif")
    upload_tree(tmp_path / "set", f"{bucket}/set")
    here, there = tmp_path / "out", f"{bucket}/out"
    how: dict[str, Any] = {"tracking_uri": "unused", "series": 1}
    predict(str(folder), [str(tmp_path / "set")], None, here, **how)
    found = predict(str(folder), [f"{bucket}/set/"], None, there, **how)
    assert found["written"]["predictions.csv"] == f"{there}/predictions.csv"
    tables = [pq.read_table(pa.BufferReader(read_bytes(f"{out}/predictions.parquet"))) for out in (here, there)]
    assert tables[0].drop_columns("uri").equals(tables[1].drop_columns("uri"))
    assert tables[0]["slide_id"].to_pylist() == ["two", "one"]
    for name in ("attention.parquet", "contact.png", "overlay.png"):
        assert read_bytes(f"{there}/slides/two/{name}") == (here / "slides" / "two" / name).read_bytes()
    assert predict(str(folder), [f"{bucket}/set/"], None, there, **how)["predicted_now"] == 0


def test_no_two_slides_share_an_id(folder: Path, tmp_path: Path) -> None:
    """Whatever the files are called, and whatever ids the cohort has."""
    paths = [tmp_path / name for name in ("a-2.png", "x/a.png", "y/a.png", "z/a.png")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no slide")
    write_slide(tmp_path / "one.png", 4)
    (tmp_path / "cohort.csv").write_text("slide_id,uri\na,one.png\n")
    out = tmp_path / "out"
    predict(str(folder), list(map(str, paths)), str(tmp_path / "cohort.csv"), out, tracking_uri="unused")
    assert csv.read_csv(out / "predictions.csv")["slide_id"].to_pylist() == ["a-2", "a-3", "a-4", "a-5", "a"]


def test_uris_that_lead_nowhere_are_rows_with_errors(folder: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "one.png", 4)
    uris = ["gcs://bucket/a.svs", "file://host/b.svs", "c\0.svs", "d\n.svs", "e\udcff.svs", str(tmp_path / "one.png")]
    predict(str(folder), uris, None, tmp_path / "out", tracking_uri="unused")
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert [bool(error) for error in table["error"].to_pylist()] == [True] * 5 + [False]
    assert "gcs:// is not supported" in table["error"][0].as_py()
    assert table["uri"][4].as_py().endswith("e\\udcff.svs")


def test_a_cohort_is_predicted_with_the_champion(folder: Path, tmp_path: Path, mlflow_uri: str) -> None:
    tracker = open_tracking(mlflow_uri, "predict", str(tmp_path / "artifacts"))
    with tracker.run("register") as run_id:
        version = register_model(tracker, "predicted", folder, run_id, tags={}, metrics={}, example_uri="a.svs")
    promote(tracker, "predicted", version.version)
    write_slide(tmp_path / "one.png", 4)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label\nspecial/one,one.png,\n")
    result = predict(
        "models:/predicted@champion", [], str(tmp_path / "cohort.csv"), tmp_path / "out", tracking_uri=tracker.uri
    )
    assert result["model"] == "models:/predicted/1"
    assert result["slides"] == 1
    (only,) = (tmp_path / "out" / "slides").iterdir()
    assert only.name == safe_name("special/one")


def test_one_image_of_a_file_of_several(folder: Path, tmp_path: Path) -> None:
    path = write_sections(tmp_path / "two.tif")
    (tmp_path / "cohort.csv").write_text("slide_id,uri,series\nupper,two.tif,0\nlower,two.tif,1\nany,two.tif,\n")
    cohort = str(tmp_path / "cohort.csv")
    result = predict(str(folder), [str(path)], cohort, tmp_path / "out", tracking_uri="unused", series=1)
    assert "(predict: --series)" in result["failed"].pop("any")
    assert not result["failed"]
    table = csv.read_csv(tmp_path / "out" / "predictions.csv").to_pydict()
    found = dict(zip(table["slide_id"], table["tumour_yes"], strict=True))
    assert found["two"] == found["lower"] != found["upper"]


def test_no_slides_no_model_and_no_good_slide_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no slides"):
        predict(str(folder), [], None, tmp_path / "out", tracking_uri="unused")
    with pytest.raises(TrackingError, match="does not exist"):
        predict("models:/a@champion", ["a.png"], None, tmp_path, tracking_uri=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(StageError, match=r"none of 1 slides.*\n.*absent\.svs"):
        predict(str(folder), [str(tmp_path / "absent.svs")], None, tmp_path / "out", tracking_uri="unused")
    assert csv.read_csv(tmp_path / "out" / "predictions.csv").num_rows == 1
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StageError, match=f"--out {out} is no folder"):
            predict(str(folder), [str(tmp_path / "absent.svs")], None, out, tracking_uri="unused")


def test_ids_and_reasons_of_others_are_no_formulas(folder: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "=cmd|x.png", 4)
    (tmp_path / "@bad.png").write_bytes(b"no slide")
    (tmp_path / "cohort.csv").write_text("slide_id,uri\n-1+1,@bad.png\n")
    out = tmp_path / "out"
    predict(str(folder), [str(tmp_path / "=cmd|x.png")], str(tmp_path / "cohort.csv"), out, tracking_uri="unused")
    table = csv.read_csv(out / "predictions.csv").to_pydict()
    assert table["slide_id"] == ["'=cmd|x", "'-1+1"]
    assert isinstance(table["tumour_yes"][0], float)
    assert pq.read_table(out / "predictions.parquet")["slide_id"].to_pylist() == ["=cmd|x", "-1+1"]


def test_microns_that_are_missing_are_asked_for_where_they_can_be_given(tmp_path: Path) -> None:
    config = small_config(tiling={"patch_px": 32, "mpp": 0.5, "min_tissue": 0.5})
    model = write_model(tmp_path, config)
    write_slide(tmp_path / "named.png", 4)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,mpp\nlisted,named.png,\nodd,named.png,99\n")
    with pytest.raises(StageError) as caught:
        predict(
            str(model),
            [str(tmp_path / "named.png")],
            str(tmp_path / "cohort.csv"),
            tmp_path / "out",
            tracking_uri="unused",
        )
    fact = "the file states no microns per px (of a plain image its resolution is not taken)"
    assert str(caught.value).splitlines()[1:] == [
        f"  - named: {fact}; give it with --mpp, as in --mpp 0.25",
        f"  - listed: {fact}; give it in the cohort's mpp column",
        "  - odd: 99 microns per px is outside 0.05..20; give it in the cohort's mpp column",
    ]
    found = predict(str(model), [str(tmp_path / "named.png")], None, tmp_path / "out", tracking_uri="unused", mpp=0.5)
    assert found["failed"] == {}


def test_a_model_with_cases_gives_intervals_and_the_next_without_gives_none(folder: Path, tmp_path: Path) -> None:
    """They follow from the table's numbers alone, so slides that are done get them too."""
    model, slides, out = tmp_path / "model", _slides(tmp_path), tmp_path / "out"
    shutil.copytree(folder, model)
    predict(str(model), slides, None, out, tracking_uri="unused")
    assert not [name for name in pq.read_table(out / "predictions.parquet").column_names if name.endswith("_low")]
    said = np.linspace(0.0, 1.0, 30)
    cases = {
        "tumour": Cases(
            np.stack([1 - said, said], axis=1), np.stack([said < 0.5, said >= 0.5], axis=1).astype(np.float64)
        )
    }
    (model / CALIBRATION).write_text(json.dumps(calibration_json(cases)))
    found = predict(str(model), slides, None, out, tracking_uri="unused")
    assert found["predicted_now"] == 1  # which failed before
    table = pq.read_table(out / "predictions.parquet")
    good, _, bad = table.to_pylist()
    low, high = venn_abers(cases["tumour"].said[:, 1], cases["tumour"].came[:, 1], good["tumour_yes"])
    assert (good["tumour_yes_low"], good["tumour_yes_high"]) == (low, high)
    assert good["tumour_no_low"] == pytest.approx(1 - high)
    assert bad["tumour_yes_low"] is None
    (told,) = [one for one in Output(str(out)).slides[0].told if one.name == "tumour_yes"]
    assert (told.low, told.high, told.interval) == (low, high, "calibrated")
    page = (out / "summary.html").read_text()
    assert f"calibrated:<br>{low:.3f} to {high:.3f}" in page
    assert "by the test of 30 patients" in page


def test_an_ensemble_is_the_mean_of_its_models_with_their_spread(folder: Path, tmp_path: Path) -> None:
    config, ensemble, slides = small_config(), tmp_path / "ensemble", _slides(tmp_path)
    for number in range(2):
        torch.manual_seed(number)
        (place := ensemble / "members" / f"{number:02d}").mkdir(parents=True)
        save_model(place, build_model(config, pretrained=False).state_dict(), config)
    found = predict(str(ensemble), slides, None, tmp_path / "out", tracking_uri="unused", how=How(heads=True))
    assert list(found["failed"]) == ["bad"]
    alone = []
    for number in range(2):
        out = tmp_path / f"alone-{number}"
        predict(str(ensemble / "members" / f"{number:02d}"), slides[:1], None, out, tracking_uri="unused")
        alone.append(pq.read_table(out / "predictions.parquet")["tumour_yes"][0].as_py())
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    row = table.to_pylist()[0]
    assert row["tumour_yes"] == pytest.approx(np.mean(alone), rel=1e-12)
    assert (row["tumour_yes_low"], row["tumour_yes_high"]) == (min(alone), max(alone))
    assert table["tumour_yes_low"].to_pylist()[2] is None  # of the slide that failed
    assert table.schema.field("tumour_yes_low").metadata == {b"ips.interval": b"models"}
    maps = pq.read_table(tmp_path / "out" / "slides" / "a" / "attention.parquet")
    both = [maps[f"attention_member_{number}"].to_numpy() for number in range(2)]
    np.testing.assert_allclose(maps["attention"].to_numpy(), np.mean(both, axis=0), rtol=1e-6)
    facts = json.loads((tmp_path / "out" / "slides" / "a" / "slide.json").read_text())
    assert "mean over 2 models" in facts["maps"]["attention"]["definition"]
    assert facts["curves"] is None
    assert f"models:<br>{min(alone):.3f} to {max(alone):.3f}" in (tmp_path / "out" / "summary.html").read_text()
    shown = Output(str(tmp_path / "out")).slides[0].told
    assert [(one.name, one.interval) for one in shown] == [("tumour_no", "models"), ("tumour_yes", "models")]
    again = predict(str(ensemble), slides[:2], None, tmp_path / "out", tracking_uri="unused", how=How(heads=True))
    assert again["predicted_now"] == 0
    torch.manual_seed(7)
    save_model(ensemble / "members" / "01", build_model(config, pretrained=False).state_dict(), config)
    again = predict(str(ensemble), slides[:2], None, tmp_path / "out", tracking_uri="unused", how=How(heads=True))
    assert again["predicted_now"] == 2


def test_features_are_made_of_a_slide_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as of stored features; nothing is tiled, or written but the folder."""
    model = {**small_config().model.model_dump(), "encoder": {"name": "features", "features": 128}}
    config, cohort = (
        small_config(embed=settings(tmp_path), model=model, train={"augment": False}),
        write_cohort(tmp_path, [None]),
    )
    (tmp_path / "model").mkdir()
    folder = str(write_model(tmp_path / "model", config))
    ((slide, stored),) = store_slides(cohort, tmp_path / "store", config)
    features = featured(config, stored, str(tmp_path / "features"))
    network, _ = load_model(Path(folder))
    wanted = predict_bag(network, open_bag(features, threads=1, augment=None), config)
    monkeypatch.setattr(unseen, "store_slide", None)
    monkeypatch.setattr(unseen, "embed_slide", None)
    predict(folder, [slide.uri], None, tmp_path / "passed", tracking_uri="unused")
    how = How(store=str(tmp_path / "store"))
    predict(folder, [slide.uri], None, tmp_path / "stored", tracking_uri="unused", how=how)
    assert _files(tmp_path / "passed") == _files(tmp_path / "stored")
    maps = pq.read_table(tmp_path / "passed" / "slides" / "s0" / "attention.parquet")
    np.testing.assert_array_equal(maps["attention"].to_numpy(), wanted.attention)
    table = pq.read_table(tmp_path / "passed" / "predictions.parquet")
    assert [table["tumour_no"][0].as_py(), table["tumour_yes"][0].as_py()] == wanted.values["tumour"].tolist()


class DyingPredicting(Predicting):
    """Whose first actor that is given a shard is killed."""

    def worker(self) -> Callable[[Any], Any]:
        return partial(_work, self, super().worker())


def _work(asked: Predicting, work: Callable[[Any], Any], item: Any) -> Any:
    if isinstance(item, Shard):
        dead = Path(asked.out) / "dead"
        if not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(asked.out) / "shards").mkdir(exist_ok=True)
        (Path(asked.out) / "shards" / f"{item.slides[0].slide_id}-{item.start}").touch()
    return work(item)


@pytest.mark.slow
@pytest.mark.ray
def test_a_large_slide_is_scored_by_all_actors_and_one_of_them_may_die(
    ray_session: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = _slides(tmp_path)
    with Image.open(slides[1]) as image:
        image.crop((0, 0, 150, 110)).save(tmp_path / "small.png")
    slides.append(str(tmp_path / "small.png"))
    alone, many, threads = tmp_path / "alone", tmp_path / "many", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        predict(str(folder), slides, None, alone, tracking_uri="unused")
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(run_module, "Predicting", DyingPredicting)
    how = How(workers=2, cluster=ClusterConfig(cpus_per_worker=1.0), shard_above=19)
    found = predict(str(folder), slides, None, many, tracking_uri="unused", how=how)
    assert list(found["failed"]) == ["bad"]
    assert (many / "dead").exists()
    assert sorted(path.name for path in (many / "shards").iterdir()) == ["a-0", "a-2-0", "a-2-7", "a-7"]
    kept = {name: data for name, data in _files(many).items() if name.split("/")[0] not in ("model", "dead", "shards")}
    assert kept == _files(alone)
    assert predict(str(folder), slides, None, many, tracking_uri="unused", how=how)["predicted_now"] == 1


@pytest.mark.slow
@pytest.mark.ray
def test_actors_give_what_one_process_of_as_many_threads_gives(ray_session: None, folder: Path, tmp_path: Path) -> None:
    slides = _slides(tmp_path)
    alone, many, threads = tmp_path / "alone", tmp_path / "many", torch.get_num_threads()
    torch.set_num_threads(1)  # sums of another number of threads are rounded otherwise
    try:
        predict(str(folder), slides, None, alone, tracking_uri="unused")
    finally:
        torch.set_num_threads(threads)
    how = How(workers=2, cluster=ClusterConfig(cpus_per_worker=1.0))
    found = predict(str(folder), slides, None, many, tracking_uri="unused", how=how)
    assert list(found["failed"]) == ["bad"]
    there = {name: data for name, data in _files(many).items() if not name.startswith("model/")}
    assert there == _files(alone)


@pytest.mark.slow
def test_a_few_slides_need_neither_ray_nor_mlflow(folder: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.png", 0)
    code = (
        "import sys; from pipeline.cli.main import app; "
        f"app(['predict', '--model', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}, {str(tmp_path / 'a.png')!r}],"
        " standalone_mode=False); print(sorted({'ray', 'mlflow'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_files_of_features_are_predicted_in_the_place_of_slides(tmp_path: Path) -> None:
    """Without pixels there are pictures of where patches are; a file that cannot be used fails alone."""
    folder = write_model(tmp_path, given_config(tmp_path))
    for name, data in {"a": trident(), "wide": trident(np.tile(VECTORS, 2)), "half": trident()[:-500]}.items():
        (tmp_path / f"{name}.h5").write_bytes(data)
    (tmp_path / "cohort.csv").write_text("slide_id,features\none,a.h5\nother,wide.h5\n")
    files = [str(tmp_path / "half.h5")]
    result = predict(str(folder), files, str(tmp_path / "cohort.csv"), tmp_path / "out", tracking_uri="unused")
    assert list(result["failed"]) == ["half", "other"]
    assert "no whole HDF5 file" in result["failed"]["half"]
    assert "set model.encoder.features=22" in result["failed"]["other"]
    (only,) = (tmp_path / "out" / "slides").iterdir()
    assert only.name == "one"
    assert pq.read_table(only / "attention.parquet").num_rows == N


def _ensemble(folder: Path, *configs: Config) -> str:
    for number, config in enumerate(configs):
        torch.manual_seed(number)
        (place := folder / "members" / f"{number:02d}").mkdir(parents=True)
        save_model(place, build_model(config, pretrained=False).state_dict(), config)
    return str(folder)


def test_actors_take_the_model_of_their_own_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier batch left for its actors is another's; here they are of this process."""
    monkeypatch.setattr(run_module, "_working", lambda _: nullcontext((run_module._here, run_module._here)))
    for seed in (0, 1):
        write_slide(tmp_path / f"{seed}.png", seed)
    three = _ensemble(tmp_path / "three", *[small_config()] * 3)
    last, how = [str(tmp_path / "1.png")], How(workers=2)
    predict(three, [str(tmp_path / "0.png")], None, tmp_path / "out", tracking_uri="unused", how=how)
    for out in ("alone", "out"):
        predict(str(folder), last, None, tmp_path / out, tracking_uri="unused", how=how)
    said = [json.loads((tmp_path / out / "slides" / "1" / "slide.json").read_text()) for out in ("alone", "out")]
    assert said[0] == said[1]


def test_models_that_cannot_be_averaged_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    def refused(name: str, *configs: Config) -> str:
        with pytest.raises(StageError) as error:
            predict(_ensemble(tmp_path / name, *configs), ["absent.svs"], None, tmp_path / "out", tracking_uri="no")
        return str(error.value)

    plain = small_config().tasks[0].model_dump()
    swapped = small_config(tasks=[{**plain, "classes": ["yes", "no"]}])
    assert "01: tasks is " in refused("swapped", small_config(), swapped)
    spread = small_config(tasks=[{**plain, "kind": "multiclass", "classes": ["a", "a_low", "b"]}])
    assert "tumour_a_low, an output and the spread of tumour_a" in refused("spread", spread, spread)


def test_a_model_that_brings_its_tissue_network_needs_the_trainer_s_no_more(tmp_path: Path) -> None:
    network = scripted(Toy(), tmp_path / "toy.pt")
    (folder := tmp_path / "model").mkdir()
    write_model(folder, small_config(tiling=small_tiling(network)))
    network.rename(folder / TISSUE_NETWORK)
    write_slide(tmp_path / "a.png", 0)
    slides, changed = [str(tmp_path / "a.png")], tmp_path / "changed"
    assert predict(str(folder), slides, None, tmp_path / "out", tracking_uri="unused", mpp=0.5)["failed"] == {}
    shutil.copytree(folder, changed)
    scripted(Toy(limit=30.0), changed / TISSUE_NETWORK)
    with pytest.raises(ConfigError, match=r"tiling.tissue_model.sha256: .*changed/tissue.network has [0-9a-f]{64}"):
        predict(str(changed), slides, None, tmp_path / "out2", tracking_uri="unused", mpp=0.5)
