from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from pipeline.errors import StageError, TrackingError
from pipeline.predict.output import safe_name
from pipeline.predict.run import predict
from pipeline.schema import ATTENTION
from pipeline.tracking.registry import promote, register_model
from pipeline.tracking.tracker import open_tracking
from tests.pipeline.small import small_config, write_model, write_sections, write_slide

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


def test_tables_and_heatmaps_are_written_and_a_bad_slide_fails_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = predict(str(folder), _slides(tmp_path), None, out, tracking_uri="unused")
    json.dumps(result)
    assert list(result["failed"]) == ["bad"]

    table = csv.read_csv(out / "predictions.csv").to_pydict()
    assert table["slide_id"] == ["a", "a-2", "bad"]
    assert table["tumour_no"][0] + table["tumour_yes"][0] == pytest.approx(1.0)
    assert table["tumour_yes"][2] is None
    assert "bad.svs" in table["error"][2]
    assert pq.read_table(out / "predictions.parquet").column_names == list(table)

    attention = pq.read_table(out / "attention.parquet")
    assert attention.schema.equals(ATTENTION, check_metadata=True)
    grouped = attention.group_by("slide_id").aggregate([("attention", "sum"), ("selected", "sum")]).to_pydict()
    assert grouped["slide_id"] == ["a", "a-2"]
    assert grouped["attention_sum"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert grouped["selected_sum"] == [5, 5]
    assert table["n_patches"] == [20, 20, 0]

    assert sorted(path.name for path in (out / "heatmaps").iterdir()) == ["a-2.png", "a.png"]
    with Image.open(out / "heatmaps" / "a.png") as picture:
        assert picture.width > 900


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
    uris = ["gs://bucket/a.svs", "file://host/b.svs", "c\0.svs", "d\n.svs", "e\udcff.svs", str(tmp_path / "one.png")]
    predict(str(folder), uris, None, tmp_path / "out", tracking_uri="unused")
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert [bool(error) for error in table["error"].to_pylist()] == [True] * 5 + [False]
    assert "gs:// is not supported" in table["error"][0].as_py()
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
    (heatmap,) = (tmp_path / "out" / "heatmaps").iterdir()
    assert heatmap.name == f"{safe_name('special/one')}.png"


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


@pytest.mark.parametrize(
    "slide_id", ["../../etc/passwd", ".hidden", "a/b", "", "x" * 300, "schräg\u2028", "con trol\n", "a\0b", ".."]
)
def test_slide_ids_never_leave_the_folder(slide_id: str, tmp_path: Path) -> None:
    name = safe_name(slide_id) + ".png"
    (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert safe_name(slide_id) != safe_name(slide_id + "_")


def test_plain_slide_ids_stay_as_they_are() -> None:
    assert safe_name("TCGA-3L-AA1B-01Z-00-DX1.8923A151") == "TCGA-3L-AA1B-01Z-00-DX1.8923A151"
