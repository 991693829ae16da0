"""Sweeps from end to end: what is scored, once, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipeline.bags import patch_bag
from pipeline.cohort.table import read_cohort
from pipeline.config.recipe import Config
from pipeline.errors import CohortError, ConfigError, StageError
from pipeline.ingest.tiler import store_slide
from pipeline.model.folder import SEEN, Seen
from pipeline.predictions.run import predict
from pipeline.storage.files import write_json
from pipeline.sweep.run import plan, run
from pipeline.sweep.scoring import Panel, Task
from pipeline.workflow.erasure import erase, find_patient
from tests.pipeline.small import small_config
from tests.pipeline.sweep.small_sweep import SLIDES, sweep_config, write_cohort, write_model

PATCHES = 20  # of a slide


@pytest.fixture
def two(tmp_path: Path, mlflow_uri: str) -> Config:
    """Two models of one tiling, of other weights, M and I."""
    write_cohort(tmp_path)
    model = {"encoder": {"stages": 2}, "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16}}
    write_model(tmp_path / "one", 3)
    write_model(tmp_path / "two", 4, model={**model, "select": {"memory": 3, "chunk": 6, "mode": "window"}})
    return sweep_config(tmp_path, mlflow_uri, {"one": str(tmp_path / "one"), "two": str(tmp_path / "two")})


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patches each call decodes."""
    counts: list[int] = []
    decode = patch_bag._decode_all

    def counted(jobs: Any) -> None:
        counts.append(len(jobs))
        decode(jobs)

    monkeypatch.setattr(patch_bag, "_decode_all", counted)
    return counts


def _changed(config: Config, **sweep: Any) -> Config:
    assert config.sweep is not None
    return config.model_copy(update={"sweep": config.sweep.model_copy(update=sweep)})


def _rows(config: Config) -> list[dict[str, Any]]:
    """All that is kept, as it lies there."""
    files = sorted((Path(config.storage.root) / "sweeps" / "rows").glob("*/*.parquet"))
    return [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]


def _folder(report: str) -> Path:
    return Path(report).parent


def test_rows_are_the_predictions_of_predict_to_the_last_bit(two: Config, tmp_path: Path, decoded: list[int]) -> None:
    result = run(two)
    assert (result.outcome, result.cells, result.scored, result.failures) == ("done", 2, 2 * SLIDES, 2)
    passes, takes = PATCHES * (SLIDES - 1), (5 + 3) * (SLIDES - 1)
    assert sum(decoded) == passes + takes  # every patch once for both, and the winners of each
    table = pq.read_table(_folder(result.report) / "predictions.parquet").to_pydict()
    for name in ("one", "two"):
        predict(str(tmp_path / name), [], str(tmp_path / "cohort.csv"), tmp_path / f"p-{name}", tracking_uri="unused")
        alone = pq.read_table(tmp_path / f"p-{name}" / "predictions.parquet").to_pydict()
        mine = [place for place, model in enumerate(table["model"]) if model == name]
        assert [table["slide_id"][place] for place in mine] == alone["slide_id"]
        for column in ("tumour_no", "tumour_yes"):
            assert [table[column][place] for place in mine] == alone[column]  # exactly
    assert table["tumour_yes"][0] != table["tumour_yes"][SLIDES]
    assert table["reason"][SLIDES - 1] == "unreadable" or table["reason"][SLIDES - 1]


def test_what_is_there_is_not_scored_again(two: Config, tmp_path: Path, decoded: list[int]) -> None:
    first = run(two)
    decoded.clear()
    again = run(two)
    assert (again.outcome, again.report, again.run_id) == ("nothing to do", first.report, None)
    edited = run(_changed(two, few=4))
    assert (edited.outcome, edited.scored) == ("done", 0)
    assert edited.report != first.report
    assert decoded == []
    write_model(tmp_path / "three", 9)
    assert two.sweep is not None
    more = _changed(two, models={**two.sweep.models, "three": str(tmp_path / "three")})
    assert [(row["model"], row["state"], row["to_score"]) for row in plan(more)["cells"]] == [
        ("one", "done", 0),
        ("two", "done", 0),
        ("three", "new", SLIDES),
    ]
    assert run(more).scored == SLIDES
    assert sum(decoded) == (PATCHES + 5) * (SLIDES - 1)


def test_a_killed_sweep_goes_on_and_each_row_is_there_once(
    two: Config, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    whole, calls = Panel.score, list[str]()

    def killed(self: Panel, task: Task) -> Any:
        calls.append(task.slide.slide_id)
        if len(calls) in (4, 9):
            raise KeyboardInterrupt
        return whole(self, task)

    monkeypatch.setattr(Panel, "score", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(two)
    result = run(two)
    assert result.outcome == "done"
    rows = [(row["scoring"], row["source"]) for row in _rows(two)]
    assert len(rows) == len(set(rows)) == 2 * SLIDES
    assert len(calls) == SLIDES + 2  # the two that the kills met were begun anew
    assert sum(decoded) == (PATCHES + 5 + 3) * (SLIDES - 1)


def test_a_slide_that_cannot_be_read_is_a_row_with_its_reason(two: Config) -> None:
    result = run(two)
    failed = [row for row in _rows(two) if row["reason"] is not None]
    assert {row["slide_id"] for row in failed} == {f"s{SLIDES - 1}"}
    assert all(row["outputs"] is None and f"s{SLIDES - 1}.png" in row["message"] for row in failed)
    good = next(row for row in _rows(two) if row["reason"] is None)
    assert good["patches_scored"] == good["patches_total"] == PATCHES
    assert good["bytes_read"] > 1000
    assert good["content"] != good["key"]
    cells = pq.read_table(_folder(result.report) / "cells.parquet").to_pylist()
    assert [row["failures"] for row in cells] == [1, 1]
    assert all(row["slides"] == SLIDES - 1 and row["cohort_slides"] == SLIDES for row in cells)
    assert all(row["accuracy_if_failures_wrong"] < row["accuracy"] for row in cells if row["accuracy"] > 0)
    page = Path(result.report).read_text()
    assert f"s{SLIDES - 1} (" in page
    assert "Compared over <b>12</b> slides" in page


def test_cells_are_compared_over_the_slides_that_all_have(
    two: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that fails on a slide takes it from the others' comparison, and from no other row."""
    whole = Panel._predict

    def picky(self: Panel, scoring: Any, bag: Any) -> Any:
        if scoring.model.name == "two" and bag._bag._slides[0].key == keys[2]:
            raise ValueError("not this one")
        return whole(self, scoring, bag)

    run(two)
    keys = {int(row["slide_id"][1:]): row["key"] for row in _rows(two) if row["reason"] is None}
    root = tmp_path / "root2"
    other = two.model_copy(update={"storage": two.storage.model_copy(update={"root": str(root)})})
    monkeypatch.setattr(Panel, "_predict", picky)
    result = run(other)
    (failed,) = [row for row in _rows(other) if row["slide_id"] == "s2" and row["reason"] is not None]
    assert (failed["reason"], failed["message"]) == ("crash", "ValueError: not this one")
    cells = pq.read_table(_folder(result.report) / "cells.parquet").to_pylist()
    assert {row["model"]: (row["slides"], row["failures"]) for row in cells} == {"one": (11, 1), "two": (11, 2)}


def test_cohorts_share_their_slides(two: Config, tmp_path: Path, decoded: list[int]) -> None:
    write_cohort(tmp_path, "part", 7)
    assert two.sweep is not None
    whole = two.sweep.cohorts["all"]
    cohorts = {"all": whole, "part": whole.model_copy(update={"uri": str(tmp_path / "part.csv")})}
    both = _changed(two, cohorts=cohorts)
    states = [(row["cohort"], row["model"], row["state"], row["to_score"]) for row in plan(both)["cells"]]
    assert states == [
        ("all", "one", "new", SLIDES),
        ("all", "two", "new", SLIDES),
        ("part", "one", "shared", 0),
        ("part", "two", "shared", 0),
    ]
    (planned,) = plan(both)["passes"]
    assert (planned["slides"], planned["models"]) == (SLIDES, ["one", "two"])
    assert run(both).scored == 2 * SLIDES
    assert sum(decoded) == (PATCHES + 5 + 3) * (SLIDES - 1)


def test_more_models_than_fit_take_passes_of_their_own(two: Config, decoded: list[int]) -> None:
    assert two.sweep is not None
    tight = _changed(two, models_gib=1e-6)
    assert [one["models"] for one in plan(tight)["passes"]] == [["one"], ["two"]]
    run(tight)
    assert sum(decoded) == (2 * PATCHES + 5 + 3) * (SLIDES - 1)


def test_a_model_that_cannot_be_had_leaves_the_others(two: Config, tmp_path: Path) -> None:
    assert two.sweep is not None
    result = run(_changed(two, models={"gone": str(tmp_path / "gone"), **two.sweep.models}))
    assert list(result.failed) == ["gone"]
    assert f"{tmp_path}/gone/weights.safetensors is absent" in result.failed["gone"]
    assert result.cells == 2
    assert "gone has no results" in Path(result.report).read_text()
    with pytest.raises(StageError, match="none of 1 models can be had"):
        run(_changed(two, models={"gone": str(tmp_path / "gone")}))


def test_one_model_under_two_names_is_refused(two: Config, tmp_path: Path) -> None:
    assert two.sweep is not None
    twice = {**two.sweep.models, "again": str(tmp_path / "one")}
    with pytest.raises(ConfigError, match=r"one \(.*/one\) and again \(.*/one\) are one model"):
        run(_changed(two, models=twice))


def test_models_of_another_task_and_cohorts_without_it_are_refused(two: Config, tmp_path: Path) -> None:
    assert two.sweep is not None
    write_model(tmp_path / "other", 5, tasks=[{"name": "tumour", "column": "label", "classes": ["yes", "no"]}])
    with pytest.raises(ConfigError, match=r"sweep\.models\.other: predicts .*\"yes\", \"no\""):
        run(_changed(two, models={**two.sweep.models, "other": str(tmp_path / "other")}))
    (tmp_path / "bare.csv").write_text("slide_id,uri\ns0,s0.png\n")
    bare = two.sweep.cohorts["all"].model_copy(update={"uri": str(tmp_path / "bare.csv")})
    with pytest.raises(CohortError, match=r"missing column 'label'.*sweep\.cohorts\.bare"):
        run(_changed(two, cohorts={"bare": bare}))


@pytest.mark.parametrize("known", ["patient", "content"])
def test_slides_that_a_model_knows_are_refused_unless_allowed(two: Config, tmp_path: Path, known: str) -> None:
    run(two)
    content = next(row["content"] for row in _rows(two) if row["slide_id"] == "s3")
    seen = (
        Seen(frozenset(), frozenset({Seen.patient("p1")}))
        if known == "patient"
        else Seen(frozenset({content}), frozenset())
    )
    write_json(str(tmp_path / "one" / SEEN), seen.as_json())
    count = 2 if known == "patient" else 1
    with pytest.raises(ConfigError, match=rf"sweep\.cohorts\.all: one was trained or validated on {count} of its 13"):
        run(two)
    result = run(_changed(two, allow_seen=True))
    cells = pq.read_table(_folder(result.report) / "cells.parquet").to_pylist()
    assert {row["model"]: row["seen_slides"] for row in cells} == {"one": count, "two": None}
    assert f"{count} slides</span>" in Path(result.report).read_text()


def test_a_known_slide_is_found_out_when_it_is_read(two: Config, tmp_path: Path) -> None:
    """By its content, under another name, though no store knows it yet; nothing is reported."""
    run(two)
    content = next(row["content"] for row in _rows(two) if row["slide_id"] == "s3")
    write_json(str(tmp_path / "one" / SEEN), Seen(frozenset({content}), frozenset()).as_json())
    fresh = two.model_copy(update={"storage": two.storage.model_copy(update={"root": str(tmp_path / "fresh")})})
    with pytest.raises(
        ConfigError, match="one was trained or validated on 1 of its 13 slides, or on their patients: s3"
    ):
        run(fresh)
    assert not list((tmp_path / "fresh" / "sweeps").glob("reports/*"))


def test_settings_are_expanded_and_those_that_mean_the_same_are_one(two: Config, tmp_path: Path) -> None:
    assert two.sweep is not None
    grid = two.sweep.grid.model_copy(
        update={
            "mode": ("exact", "random", "every"),
            "memory": (2, 5),
            "seed": (0, 1),
            "precision": ("float32", "bfloat16"),
        }
    )
    result = run(_changed(two, models={"one": str(tmp_path / "one")}, grid=grid))
    assert result.cells == 4 + 4 + 1
    cells = pq.read_table(_folder(result.report) / "cells.parquet").to_pylist()
    assert sum(row["mode"] == "every" for row in cells) == 1
    rows = [row for row in _rows(two) if row["slide_id"] == "s1"]
    assert sorted({(row["precision"], row["seed"]) for row in rows}, key=str) == [
        ("bfloat16", None), ("float32", 0), ("float32", 1), ("float32", None),
    ]  # fmt: skip
    assert {row["patches_scored"] for row in rows} == {2, 5, PATCHES}
    drawn = {tuple(row["outputs"]) for row in rows if row["seed"] is not None}
    assert len(drawn) == 4


def test_each_cell_is_a_run_below_the_sweep_s(two: Config) -> None:
    result = run(two)
    assert two.tracking.uri is not None
    client = MlflowClient(two.tracking.uri)
    parent = client.get_run(str(result.run_id))
    assert parent.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= {"report.html", "cells.csv"}
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.kind = 'sweep cell' and tags.mlflow.parentRunId = '{result.run_id}'"
    )
    assert {run.data.tags["model"] for run in found} == {"one", "two"}
    cells = {row["model"]: row for row in pq.read_table(_folder(result.report) / "cells.parquet").to_pylist()}
    for one in found:
        assert one.data.metrics["auc"] == cells[one.data.tags["model"]]["auc"]
        assert one.data.tags["memory"] == {"one": "5", "two": "3"}[one.data.tags["model"]]


def test_rows_of_another_version_of_a_slide_do_not_count(two: Config, tmp_path: Path) -> None:
    run(two)
    (tmp_path / "s0.png").write_bytes((tmp_path / "s1.png").read_bytes())
    assert run(two).scored == 2


def test_an_erased_patient_is_in_no_report_no_heatmap_and_no_row(two: Config, tmp_path: Path) -> None:
    """Also one of a cohort that is swept alone."""
    empty = tmp_path / "own.csv"
    empty.write_text("slide_id,uri\nother,other.png\n")
    result = run(_changed(two, overlays=3))
    sweeps = Path(two.storage.root) / "sweeps"
    assert list(sweeps.glob("overlays/*.png"))
    assert list(_folder(result.report).glob("overlays/*.png"))
    config = two.model_copy(update={"cohort": two.cohort.model_copy(update={"uri": str(empty)})})
    traces = find_patient(config, "p1")
    assert set(traces.slides) == {"s2", "s3"}
    sources = {row["source"] for row in _rows(two) if row["slide_id"] in ("s2", "s3")}
    erase(traces)
    assert not _folder(result.report).exists()
    assert {"s2", "s3"}.isdisjoint(row["slide_id"] for row in _rows(two))
    assert not [path for path in sweeps.rglob("*") if any(source in path.name for source in sources)]


def test_a_sweep_that_runs_elsewhere_is_left_alone(two: Config) -> None:
    from pipeline.storage.lease import held

    with held(str(Path(two.storage.root) / "sweeps" / "sweep.lease"), "another"), pytest.raises(StageError):
        run(two)


def test_without_the_section_it_says_what_to_name(two: Config) -> None:
    with pytest.raises(ConfigError, match="sweep: is required"):
        run(two.model_copy(update={"sweep": None}))
    with pytest.raises(ConfigError, match=r"(?s)sweep\.models: is empty.*sweep\.cohorts: is empty"):
        plan(_changed(two, models={}, cohorts={}))


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_as_in_this_process(two: Config, tmp_path: Path, ray_session: None) -> None:
    run(two)
    here = {(row["scoring"], row["slide_id"]): row["outputs"] for row in _rows(two)}
    cluster = two.cluster.model_copy(update={"workers": 2, "cpus_per_worker": 1.0})
    storage = two.storage.model_copy(update={"root": str(tmp_path / "other")})
    there = two.model_copy(update={"cluster": cluster, "storage": storage})
    there = _changed(there, workers=None, overlays=2, shard_above=10)  # slides in the store are split in two
    for slide in read_cohort(str(tmp_path / "cohort.csv")).slides[:3]:
        store_slide(slide, small_config().tiling, str(storage.patches))
    result = run(there)
    found = {(row["scoring"], row["slide_id"]): row["outputs"] for row in _rows(there)}
    assert found.keys() == here.keys()
    for key, outputs in found.items():
        np.testing.assert_allclose(outputs or [np.nan], here[key] or [np.nan], rtol=1e-5)
    assert len(list((_folder(result.report) / "overlays").glob("*.png"))) == 2
