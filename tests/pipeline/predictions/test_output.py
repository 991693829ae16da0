from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError
from pipeline.model.calibration import Cases, intervals
from pipeline.model.folder import Seen, keep_any, whole_digest
from pipeline.predictions.output import (
    Failure,
    Outcome,
    begun_names,
    check_spread,
    commit,
    folder_of,
    forget_models,
    read_facts,
    safe_name,
    with_intervals,
    write_tables,
)
from tests.pipeline.small import small_config, write_model


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


def test_a_folder_is_done_when_it_says_so(tmp_path: Path) -> None:
    place = folder_of(str(tmp_path), "a b")
    assert begun_names(str(tmp_path)) == set()
    assert read_facts(place) is None
    commit(place, {"identity": "x"})
    assert read_facts(place) == {"identity": "x"}
    assert begun_names(str(tmp_path)) == {safe_name("a b")}
    (Path(place) / "slide.json").write_text('{"ident')
    assert read_facts(place) is None


def _kept(out: Path, sources: Path) -> list[str]:
    """Digests of two models and an ensemble, kept as batches on Ray keep them."""
    for number, name in enumerate(("a", "b", "e/members/x", "e/members/y")):
        (sources / name).mkdir(parents=True)
        write_model(sources / name, small_config(train={"score_batch": 64 + 8 * number}))
    digests = []
    for folder in (sources / "a", sources / "b", sources / "e"):
        digests.append(whole_digest(folder))
        keep_any(folder, str(out / "model" / digests[-1]))
    return digests


def _models(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "model").iterdir())


def test_copies_of_models_go_that_no_slide_names_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named, *replaced = _kept(tmp_path, tmp_path / "sources")
    commit(folder_of(str(tmp_path), "a"), {"model": {"digest": named}})
    (tmp_path / "slides" / "begun").mkdir()
    (tmp_path / "slides" / "begun" / "slide.json").write_text("[]")  # it is made again
    with caplog.at_level("INFO"):
        forget_models(str(tmp_path), "now", tmp_path / "sources" / "a")
    assert _models(tmp_path) == [named]
    assert all(digest in caplog.text for digest in replaced)


def test_models_of_the_user_stay_wherever_they_lie(tmp_path: Path) -> None:
    """Also where a batch goes to the folder of an experiment that has a folder `model`."""
    first, second, third = _kept(tmp_path, tmp_path / "model" / "mine")
    (tmp_path / "model" / "epoch_10").mkdir()
    (tmp_path / "model" / "epoch_10" / "weights.safetensors").write_bytes(b"of three weeks")
    (tmp_path / "model" / first / "notes.txt").write_text("of the user")
    (tmp_path / "model" / second / "config.json").write_text("{}")  # of another release
    (tmp_path / "model" / ("0" * 32)).mkdir()
    before = _models(tmp_path)
    forget_models(str(tmp_path), "now", tmp_path / "model" / third / "members")
    assert _models(tmp_path) == before


def test_models_stay_where_a_slide_does_not_tell_its_own(tmp_path: Path) -> None:
    digests = _kept(tmp_path, tmp_path / "sources")
    commit(folder_of(str(tmp_path), "a"), {"model": "models:/m/1"})
    commit(folder_of(str(tmp_path), "b"), {"of": "something else"})
    forget_models(str(tmp_path), "now", tmp_path / "sources" / "a")
    assert _models(tmp_path) == sorted(digests)


def test_labels_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    tasks = [TaskConfig(name="t", column="label", classes=("no", "yes"))]
    for labels, expected in (([{"t": "yes"}, {}], True), ([{}, {"t": None}], False)):
        write_tables(str(tmp_path), [("a", "a.svs"), ("b", "b.svs")], [Failure("x", "y")] * 2, labels, tasks)
        head = (tmp_path / "predictions.csv").read_text().splitlines()[0]
        assert ('"t_label"' in head) == expected


def test_a_slide_of_the_test_is_told_without_itself_and_one_of_the_training_not_at_all() -> None:
    task, n = TaskConfig(name="t", column="label", classes=("no", "yes")), 20
    said, came = np.linspace(0.0, 1.0, n), np.arange(n) % 2.0
    names = tuple((Seen.patient(f"p{number}"), f"key{number}") for number in range(n))
    cases = {"t": Cases(np.stack([1 - said, said], axis=1), np.stack([1 - came, came], axis=1), names)}
    facts: dict[str, Any] = {"values": {"t_no": 1 - said[3], "t_yes": said[3]}}
    of_test = {**facts, "key": "key3"}
    whose = ["x", "x", "p3", "learned", "x", "x", "x"]
    learned: list[Outcome] = [
        {**facts, "key": "learned key"},
        {**facts, "key": "at other microns", "content": "learned"},
    ]
    outcomes: list[Outcome] = [facts, of_test, facts, facts, *learned, Failure("a", "b")]
    seen = Seen(frozenset({"learned key", "learned"}), frozenset({Seen.patient("learned")}))
    found = [
        one if isinstance(one, Failure) else one["intervals"]
        for one in with_intervals(outcomes, whose, [task], cases, seen)
    ]
    new = intervals([task], cases, facts["values"])
    own = intervals([task], {"t": cases["t"].without([names[3][0]])}, facts["values"])
    assert own != new
    assert found == [new, own, own, {}, {}, {}, Failure("a", "b")]


def test_a_spread_never_takes_the_place_of_an_output() -> None:
    check_spread([TaskConfig(name="t", column="label", classes=("low", "high"))], 5)
    tasks = [TaskConfig(name="t", column="label", kind="multiclass", classes=("a", "a_low", "b"))]
    with pytest.raises(StageError, match="twice: t_a_low, an output and the spread of t_a; predict its models alone"):
        check_spread(tasks, 2)
    check_spread(tasks, 1)
