from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cohort.frozen import newest
from pipeline.config.base import fingerprint
from pipeline.errors import StageError
from pipeline.gate.decision import replay
from pipeline.model.calibration import CALIBRATION, Cases, read_calibration
from pipeline.release.arrivals import Arrivals, Row
from pipeline.release.history import Act, append
from pipeline.release.judge import SAME, Question, judging
from pipeline.release.trained import read_trained
from pipeline.tracking.registry import RegisteredVersion, alias_version, champion, fetch, find_version
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.workflow.stage import Record, Workspace
from tests.pipeline.release.space import Study, small_study

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.slow,  # 20 s: models are registered, and tasks of Ray load torch
]


@pytest.fixture
def study(ray_session: None, mlflow_uri: str, tmp_path: Path) -> Study:
    tracker: Tracker = open_tracking(mlflow_uri, "judge", str(tmp_path / "artifacts"))
    return small_study(tmp_path, tracker, {"train": 6, "test": 6})


def _arrivals(study: Study, **changed: Row) -> Arrivals:
    rows: dict[str, Row] = {
        fingerprint(slide.slide_id): (fingerprint(slide.patient_id), "v", "g", "l") for slide in study.cohort.slides
    }
    return Arrivals(study.cohort, {**rows, **changed}, frozenset(rows), fingerprint(sorted(changed)))


def _judge(space: Workspace, question: Question) -> Record:
    tracker = space.tracker()
    with tracker.run("retrain") as parent, tracker.run("judge", parent) as run_id:
        stage = judging(question)
        record = stage.work(space, fingerprint(stage.identity(space)), run_id)
        return replace(record, run_id=parent)


def _first(study: Study, **gate: Any) -> tuple[Record, RegisteredVersion]:
    record = _judge(study.space(1, gate=gate or {"approval": True}), Question(None, None, None, _arrivals(study), None))
    name = str(study.config.tracking.model)
    return record, find_version(study.tracker, f"models:/{name}/{record.facts['version']}")


def _cases(study: Study, version: RegisteredVersion, folder: Path) -> Cases:
    """What intervals of a registered version follow from."""
    _, artifacts = fetch(study.tracker, version.uri, folder / f"version{version.version}")
    return read_calibration(artifacts, study.config.tasks)["tumour"]


def test_a_first_model_is_judged_and_all_that_was_decided_by_is_kept(study: Study, tmp_path: Path) -> None:
    record, version = _first(study, first="floors", floors=[{"measure": "accuracy", "bound": 0.0, "least": 1}])
    assert record.facts["verdict"] == "promote"
    data, difference = replay(record.outputs["decision"])
    assert difference is None
    decision = json.loads(data)
    assert (decision["champion"], decision["names_champion"]) == (None, None)
    assert decision["manifest"]["slides"] == decision["manifest"]["patients"] == 6
    folder = Path(record.outputs["decision"]).parent
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "decision.json", "evidence.json", "changes.csv", "candidate.html", "candidate.csv", "gate.html",
    }  # fmt: skip
    kept = study.tracker.client.list_artifacts(str(record.run_id), "release")
    assert {item.path for item in kept} == {f"release/{name}" for name in names}
    assert version.tags["release.decision"] == record.facts["decision"]
    assert version.tags["release.manifest"].startswith("1 ")
    entry = study.tracker.client.get_model_version(version.name, version.version)
    assert "on version 1 of the frozen test (6 slides of 6 patients): **promote**" in entry.description
    assert champion(study.tracker, version.name) is None  # no alias moves here
    trained = read_trained(study.config.storage.root, "train1")
    assert trained is not None
    assert len(trained.learned["keys"]) == len(trained.slides) == 6
    cases = _cases(study, version, tmp_path)
    assert len(cases.said) == 6
    assert {name for names in cases.names for name in names} > {study.keys[f"test{n}"] for n in range(6)}
    text = (folder / "evidence.json").read_text()
    assert "test0" not in text
    assert "p-test" not in text


def test_champion_and_candidate_meet_on_the_frozen_test_whatever_the_cohort_says_by_now(study: Study) -> None:
    _, version = _first(study)
    trained = read_trained(study.config.storage.root, "train1")
    frozen = newest(study.config.storage.root)
    slides = [
        replace(s, labels={"tumour": "yes"}) if s.slide_id == "test0" else s
        for s in study.cohort.slides
        if s.slide_id != "test1"
    ]
    grown = replace(study, cohort=replace(study.cohort, slides=tuple(slides)))
    space = grown.space(2, gate={"no_worse": {"margin": 0.9, "least": 2, "resamples": 200}})
    record = _judge(space, Question(None, version, trained, _arrivals(study, extra=("p", "v", "g", "l")), None))
    decision = json.loads(Path(record.outputs["decision"]).read_text())
    assert decision["names_champion"] == version.version == decision["champion"]["version"]
    assert decision["candidate"]["version"] != version.version
    counts = {name: decision["manifest"][name] for name in ("slides", "missing", "relabelled", "rescanned")}
    assert counts == {"slides": 5, "missing": 1, "relabelled": 1, "rescanned": 0}
    rules = {rule["rule"]: rule["outcome"] for rule in decision["rules"]}
    assert rules["test missing"] == rules["test relabelled"] == "not met"  # one of six each
    assert alias_version(study.tracker, version.name, "challenger") == decision["candidate"]["version"]
    assert newest(study.config.storage.root) == frozen
    assert record.facts["diff"]["added"] == 1
    evidence = json.loads((Path(record.outputs["decision"]).parent / "evidence.json").read_text())
    labels = {slide["slide"]: slide["labels"]["tumour"] for slide in evidence["slides"]}
    assert labels[fingerprint("test0")] == "no"
    assert evidence["champion"]["seen"] == evidence["candidate"]["seen"] == []


def test_a_champion_that_has_learned_from_the_test_is_found(study: Study) -> None:
    _, version = _first(study)
    trained = read_trained(study.config.storage.root, "train1")
    assert trained is not None
    seen = {**trained.learned, "keys": [*trained.learned["keys"], study.keys["test3"]]}
    question = Question(
        None, version, replace(trained, learned=seen), _arrivals(study, more=("p", "v", "g", "l")), None
    )
    record = _judge(study.space(3, gate={"floors": [{"measure": "accuracy", "bound": 0.0, "least": 1}]}), question)
    assert record.facts["verdict"] == "hold"
    evidence = json.loads((Path(record.outputs["decision"]).parent / "evidence.json").read_text())
    assert evidence["champion"]["seen"] == [fingerprint("test3")]


def test_a_candidate_is_no_witness_of_slides_it_has_learned_from(study: Study, tmp_path: Path) -> None:
    slides = [replace(s, patient_id="p-train0") if s.slide_id == "test3" else s for s in study.cohort.slides]
    mixed = replace(study, cohort=replace(study.cohort, slides=tuple(slides)))
    record, version = _first(mixed)
    evidence = json.loads((Path(record.outputs["decision"]).parent / "evidence.json").read_text())
    assert evidence["candidate"]["seen"] == [fingerprint("test3")]
    cases = _cases(study, version, tmp_path)
    assert {key for _, key in cases.names} == {study.keys[f"test{n}"] for n in range(6) if n != 3}


def test_a_candidate_that_has_learned_from_all_of_the_test_has_no_witness(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slides = [replace(s, patient_id="p-train0") if s.split == "test" else s for s in study.cohort.slides]
    mixed = replace(study, cohort=replace(study.cohort, slides=tuple(slides)))
    _, version = _first(mixed)
    _, artifacts = fetch(study.tracker, version.uri, tmp_path)
    assert not (artifacts / CALIBRATION).exists()
    assert "no intervals by the frozen test: it has learned from all of its slides" in caplog.text


def test_weights_of_which_the_past_is_not_known_make_no_clean_candidate(study: Study, tmp_path: Path) -> None:
    other = study.space(5).records["train"].outputs["checkpoint"]
    train = {**study.config.train.model_dump(), "begins_with": f"{other}/weights.safetensors"}
    gate = {"first": "floors", "floors": [{"measure": "accuracy", "bound": 0.0, "least": 1}]}
    record = _judge(study.space(1, gate=gate, train=train), Question(None, None, None, _arrivals(study), None))
    assert record.facts["verdict"] == "hold"
    evidence = json.loads((Path(record.outputs["decision"]).parent / "evidence.json").read_text())
    assert evidence["candidate"]["seen"] is None
    version = find_version(study.tracker, f"models:/{study.config.tracking.model}/{record.facts['version']}")
    with pytest.raises(KeyError):
        _cases(study, version, tmp_path)
    assert read_trained(study.config.storage.root, "train1") is None  # nor is it known of the champion that it may be


def test_new_slides_are_compared_with_those_the_champion_learned_from(study: Study) -> None:
    _, version = _first(study)
    trained = read_trained(study.config.storage.root, "train1")
    assert trained is not None
    new = {fingerprint(f"train{n}") for n in (4, 5)}
    kept = {**trained.learned, "keys": [study.keys[f"train{n}"] for n in range(4)]}
    assert trained.rows is not None
    before = replace(trained, learned=kept, rows={s: row for s, row in trained.rows.items() if s not in new})
    space = study.space(4, gate={"drift": {"least": 2, "effect": 0.0, "alpha": 0.99}})
    record = _judge(space, Question(None, version, before, _arrivals(study), None))
    evidence = json.loads((Path(record.outputs["decision"]).parent / "evidence.json").read_text())
    found = {one["name"]: one for one in evidence["drift"]}
    assert {"embeddings", "tumour predictions", "tumour labels", "eosin", "patches"} <= set(found)
    assert (found["embeddings"]["n_new"], found["embeddings"]["n_old"]) == (2, 4)
    assert Path(record.facts["pages"]["drift"]).read_text().count("<svg") >= 8


def test_a_training_that_gave_the_champion_itself_decides_nothing(study: Study) -> None:
    _, version = _first(study)
    trained = read_trained(study.config.storage.root, "train1")
    question = Question(None, version, trained, _arrivals(study, touched=("p", "v", "g", "l")), None)
    record = _judge(study.space(1), question)
    assert (record.facts["verdict"], record.facts["version"]) == (SAME, version.version)
    assert "test_auc" in record.metrics
    assert read_trained(study.config.storage.root, "train1") == trained
    assert alias_version(study.tracker, version.name, "challenger") == version.version  # of when it was judged itself
    refreshed = study.space(1, retrain={"refresh_test": 1})
    assert _judge(refreshed, question).facts["manifest"] == 2
    found = newest(study.config.storage.root)
    assert found is not None
    assert (found.version, len(found.cases)) == (2, 6)


def test_a_model_that_was_taken_back_is_judged_anew_and_waits(study: Study) -> None:
    record, version = _first(study, first="floors", floors=[{"measure": "accuracy", "bound": 0.0, "least": 1}])
    assert record.facts["verdict"] == "promote"
    space, arrivals = study.space(1, gate=study.config.gate), _arrivals(study)
    before = judging(Question(None, None, None, arrivals, None)).identity(space)
    question = Question(None, None, None, arrivals, "force it", {"train1": "version 1 was taken back by ada"})
    assert judging(replace(question, force=None)).identity(space) != before
    gate = {"first": "floors", "floors": [{"measure": "accuracy", "bound": 0.0, "least": 1}]}
    again = _judge(study.space(1, gate=gate), question)
    assert (again.facts["verdict"], again.facts["version"]) == ("hold", version.version)


def test_a_judged_model_that_was_deleted_before_anything_followed_is_judged_again(study: Study) -> None:
    record, version = _first(study)
    stage = judging(Question(None, None, None, _arrivals(study), None))
    assert stage.outdated(study.space(1), record) is None
    study.tracker.client.delete_model_version(version.name, version.version)
    assert (
        stage.outdated(study.space(1), record)
        == f"version {version.version} of {version.name} is not in the registry any more"
    )
    name = record.facts["decision"]
    act = Act("hold", version.name, None, None, None, version.version, version.version, name, ("why",), "retrain")
    append(study.config.storage.root, act, None)
    assert stage.outdated(study.space(1), record) is None


def test_a_test_of_which_nothing_is_left_says_so(study: Study) -> None:
    _first(study)
    alone = replace(study.cohort, slides=study.cohort.subset("train"))
    space = replace(study, cohort=alone).space(2)
    with pytest.raises(StageError, match="none of the 6 slides of the frozen test, version 1, is in the cohort"):
        _judge(space, Question(None, None, None, _arrivals(study), None))
