from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.frozen import Manifest, contaminated, draw_up, freeze, newest, present, problems
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.data import TaskConfig
from pipeline.errors import StageError

TASK = TaskConfig(name="t", column="t", classes=("0", "1"))
SLIDES = [
    CohortSlide(
        f"s{n}", f"/s{n}.tif", f"p{n // 2}", "test" if n < 5 else "train", None, {"t": str(n % 2)}, {"site": "n"}
    )
    for n in range(7)
]
KEYS = {f"s{n}": f"key{n}" for n in range(7) if n != 3}  # s3 was not committed


def _draw_up(version: int, slides: Sequence[CohortSlide], keys: Mapping[str, str] = KEYS) -> Manifest:
    return draw_up(version, "test", slides, keys, [TASK])


def test_the_test_is_the_committed_slides_of_the_split_and_never_changes(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert newest(root) is None
    first = _draw_up(1, SLIDES)
    assert sorted(case.key for case in first.cases) == ["key0", "key1", "key2", "key4"]
    assert _draw_up(1, SLIDES[::-1]) == first
    uri = freeze(root, first)
    text = Path(uri).read_text()
    assert "s0" not in text
    assert "p1" not in text
    assert freeze(root, first) == uri
    with pytest.raises(StageError, match=r"test-0001\.json was frozen by another process meanwhile"):
        freeze(root, replace(first, cases=first.cases[:1]))
    assert newest(root) == first
    assert newest(root).digest == first.digest  # type: ignore[union-attr]
    second = _draw_up(2, SLIDES[:2])
    freeze(root, second)
    assert newest(root) == second
    assert second.digest != first.digest


def test_what_became_of_a_case_is_seen_and_its_label_stays() -> None:
    manifest = _draw_up(1, SLIDES)
    now = [replace(SLIDES[0], labels={"t": "1"}), SLIDES[1], replace(SLIDES[4], split="train")]
    found = {one.slide.slide_id: one for one in present(manifest, now, {**KEYS, "s1": "another"})}
    assert set(found) == {"s0", "s1", "s4"}
    assert {name: (one.relabelled, one.rescanned) for name, one in found.items()} == {
        "s0": (True, False),
        "s1": (False, True),
        "s4": (False, False),
    }
    assert found["s0"].slide.labels == {"t": "0"}
    assert found["s4"].slide.split == "test"
    assert found["s1"].case.key == "key1"
    assert present(manifest, now, {}) == []


def test_slides_that_were_learned_from_are_found_by_content_and_by_patient() -> None:
    cases = present(_draw_up(1, SLIDES), SLIDES, KEYS)
    assert contaminated(cases, {"keys": ["key5"], "patients": [fingerprint("p3")]}) == []
    assert contaminated(cases, {"keys": ["key2"], "patients": []}) == [fingerprint("s2")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p0")]}) == sorted(map(fingerprint, ["s0", "s1"]))


def test_a_test_slide_whose_file_or_patient_is_now_one_that_was_learned_from_is_found() -> None:
    now = [replace(slide, patient_id="p9") if slide.slide_id == "s4" else slide for slide in SLIDES]
    cases = present(_draw_up(1, SLIDES), now, {**KEYS, "s1": "another"})
    assert contaminated(cases, {"keys": ["another"], "patients": []}) == [fingerprint("s1")]
    assert contaminated(cases, {"keys": ["key1"], "patients": []}) == [fingerprint("s1")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p9")]}) == [fingerprint("s4")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p2")]}) == sorted(map(fingerprint, ["s4"]))


def test_what_measures_nothing_is_not_frozen() -> None:
    with pytest.raises(StageError, match="no slide of split test is committed, so there is no test to freeze"):
        _draw_up(1, SLIDES, {"s5": "key5"})
    with pytest.raises(StageError, match="the 2 committed slides of split test have only class '0' of task t; frozen"):
        _draw_up(1, SLIDES, {"s0": "key0", "s2": "key2"})
    with pytest.raises(StageError, match="have no label of task t"):
        _draw_up(1, [replace(slide, labels={"t": None}) for slide in SLIDES])


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"name": "other"}, "tasks.0: test 3, which was frozen for t, has no label of task other; go back to"),
        ({"classes": ("0", "2")}, "has labels that are none of task t now: 1; go back to the task as it was, or set"),
        ({"kind": "regression", "classes": ()}, "none of task t now: 0, 1; .* or set retrain.refresh_test=3, which"),
        ({"kind": "multilabel", "classes": ("1", "x")}, "none of task t now: 0;"),
        ({"kind": "survival", "classes": (), "bins": (1.0, 2.0), "event_column": "e"}, None),
        ({"classes": ("0", "1", "2"), "kind": "multiclass"}, None),
    ],
)
def test_tasks_that_the_frozen_labels_cannot_measure_are_told_with_the_remedy(
    task: dict[str, object], says: str | None
) -> None:
    asked = TaskConfig.model_validate({"name": "t", "column": "t", "classes": ("0", "1"), **task})
    found = problems(_draw_up(3, SLIDES), [asked])
    assert len(found) == (says is not None)
    if says is not None:
        assert re.search(says, found[0])


def test_a_slide_under_another_name_is_the_same_and_two_that_changed_names_are_told_apart() -> None:
    manifest = _draw_up(1, SLIDES)
    ids = {"s0": "s1", "s1": "s0", "s2": "new"}
    now = [replace(slide, slide_id=ids.get(slide.slide_id, slide.slide_id)) for slide in SLIDES]
    keys = {ids.get(slide, slide): key for slide, key in KEYS.items()}
    found = {one.case.key: one for one in present(manifest, now, keys)}
    assert {key: one.slide.slide_id for key, one in found.items()} == {
        "key0": "s1", "key1": "s0", "key2": "new", "key4": "s4",
    }  # fmt: skip
    assert {one.slide.uri for one in found.values()} == {"/s0.tif", "/s1.tif", "/s2.tif", "/s4.tif"}
    assert [found[f"key{n}"].renamed for n in (0, 1, 2, 4)] == [True, True, True, False]
    assert not any(one.rescanned or one.relabelled for one in found.values())


def test_no_slide_stands_for_two_cases() -> None:
    manifest = _draw_up(1, SLIDES)
    copy = replace(SLIDES[0], slide_id="copy")
    found = present(manifest, [*SLIDES, copy], {**KEYS, "copy": "key0", "s1": "key0"})
    assert {one.case.key: one.slide.slide_id for one in found} == {
        "key0": "s0", "key1": "s1", "key2": "s2", "key4": "s4",
    }  # fmt: skip
    found = present(manifest, [SLIDES[1]], {"s1": "key0"})  # s1 shows what s0 was: it is that
    assert [(one.case.key, one.slide.slide_id) for one in found] == [("key0", "s1")]
