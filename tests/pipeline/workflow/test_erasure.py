from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.bags.patients import merged
from pipeline.bags.sources import patch_store
from pipeline.cohort.patients import bag_name
from pipeline.cohort.table import read_cohort
from pipeline.errors import StageError
from pipeline.results.tables import table_csv
from pipeline.store.verify import verify_store
from pipeline.workflow.erasure import Traces, _from_catalogue, erase, find_patient
from pipeline.workflow.leftovers import find_leftovers
from pipeline.workflow.run import plan, run
from tests.pipeline.tiled import RGB, SPEC, row, small_tasks, spoilt, tile_in_shares, what_is_stored
from tests.pipeline.workflow.images import image_config, write_images
from tests.synth import write_pyramid

pytestmark = pytest.mark.ray

COHORT = {"alpha": "p-one", "beta": "p-two", "gamma": "p-two", "badly": "p-two", "delta": "p-three"}


def _naming(root: Path, words: list[str]) -> set[str]:
    """Files below the root, MLflow's aside, whose name or bytes hold one of the words."""
    found = set()
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith(("mlflow", "artifacts", ".mlflow")):
            data = path.read_bytes()
            if any(word in name or word.encode() in data for word in words):
                found.add(name)
    return found


@pytest.mark.slow
def test_nothing_of_an_erased_patient_is_left_below_the_root(ray_session: None, tmp_path: Path) -> None:
    write_images(tmp_path, COHORT)
    config = image_config(tmp_path, "tiling.max_bad_slides=1")
    root = Path(config.storage.root)
    words = ["p-two", "beta", "gamma", "badly"]
    keys = run(config, "tile").stages["tile"].record.keys
    theirs = (keys["alpha"], keys["delta"])
    others = {name: patches for name, patches in what_is_stored(root).items() if name.endswith(theirs)}
    assert len(others) == 2
    secret = patch_store(config).slide(keys["beta"]).payloads([0])[0]
    assert any(secret in path.read_bytes() for path in root.rglob("*.arrow"))
    for decision, name in (("abc", "beta"), ("def", "alpha")):
        folder = root / "release" / "decisions" / decision
        folder.mkdir(parents=True)
        (folder / "changes.csv").write_text(f'"slide_id","change"\n"{name}","added"\n')
        (folder / "gate.html").write_text(f"{name} was added")
        (folder / "decision.json").write_text("{}")
    assert _naming(root, words)

    traces = find_patient(config, "p-two")
    assert set(traces.slides) == {"beta", "gamma", "badly"}
    assert traces.packs
    assert _naming(root, words)  # told, not done
    erase(traces)
    assert _naming(root, [*words, keys["beta"], keys["gamma"]]) == set()
    assert {name: patches for name, patches in what_is_stored(root).items() if name in others} == others
    assert not any(secret in path.read_bytes() for path in root.rglob("*.arrow"))
    kept = sorted(str(path.relative_to(root / "release" / "decisions")) for path in root.glob("release/decisions/*/*"))
    assert kept == ["abc/decision.json", "def/changes.csv", "def/decision.json", "def/gate.html"]
    verified = verify_store(str(config.storage.patches), 2, lambda *_: None)
    assert verified.damage + verified.leftovers == []
    said = "\n".join(traces.left)
    assert "rows badly, beta, gamma; remove them" in said
    assert str(tmp_path / "beta.png") in said
    assert str(config.tracking.uri) in said

    write_images(tmp_path, {name: patient for name, patient in COHORT.items() if patient != "p-two"})
    assert [item.action for item in plan(config, "tile")] == ["run"]
    assert run(config, "tile").stages["tile"].record.metrics["slides"] == 2
    assert _naming(root, words) == set()
    assert find_leftovers(config, 0) == []
    with pytest.raises(StageError, match="no slide of patient 'p-two'"):
        find_patient(config, "p-two")


def test_what_a_slide_that_was_given_up_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tasks(monkeypatch.setattr)
    path = spoilt("zeroed", write_pyramid(tmp_path / "good.tiff", RGB, levels=1), tmp_path)
    assert str(tile_in_shares(row(path), str(tmp_path / "store")).reason).startswith("bad-tiles")
    spec = tmp_path / "store" / SPEC.fingerprint()
    (left,) = (folder.name for folder in spec.iterdir() if len(folder.name) == 32)
    traces = Traces("p", {"slide": str(path)})
    _from_catalogue(str(spec), traces)
    assert traces.keys == {left}


@pytest.mark.parametrize("specimen", [None, "block"])
def test_reports_whose_rows_are_patients_go_with_the_patient(tmp_path: Path, specimen: str | None) -> None:
    """By `patient_id`, for `slide_id` holds the bag's name; the first is one that a spreadsheet would compute."""
    rows = ["one,1.png,-smith,A,1", "two,2.png,-smith,B,1", "three,3.png,smith,A,0"]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,patient_id,block,label", *rows]) + "\n")
    chosen = [] if specimen is None else [f"cohort.specimen={specimen}"]
    config = image_config(tmp_path, "cohort.bag=patient", *chosen)
    reports, stages = Path(config.storage.root) / "reports", Path(config.storage.root) / "stages"
    stages.mkdir(parents=True)
    for slide in read_cohort(config.cohort.uri, config.tasks).slides[1:]:
        bag, folder = merged([slide], bag_name(slide, specimen)), reports / f"of {slide.slide_id}"
        table = {"slide_id": [bag.slide_id], "uri": [bag.uri], "patient_id": [bag.patient_id]}
        folder.mkdir(parents=True)
        (folder / "predictions.csv").write_bytes(table_csv(pa.table(table)))
        outputs = {"outputs": {"report": str(folder / "report.html")}}
        (stages / f"evaluate-{slide.slide_id}.json").write_text(json.dumps(outputs))
    found = find_patient(config, "-smith")
    assert found.erasable == [str(stages / "evaluate-two.json"), str(reports / "of two")]


def test_a_picture_that_another_patient_has_too_stays(ray_session: None, tmp_path: Path) -> None:
    write_images(tmp_path, {"one": "p", "two": "q"})
    (tmp_path / "two.png").write_bytes((tmp_path / "one.png").read_bytes())
    config = image_config(tmp_path)
    (key,) = set(run(config, "tile").stages["tile"].record.keys.values())
    traces = find_patient(config, "q")
    assert traces.shared == {key}
    assert not any(key in uri for uri in traces.erasable)
    assert any(key in what for what in traces.left)
