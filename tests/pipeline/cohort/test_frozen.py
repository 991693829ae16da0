from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.cohort.frozen import contaminated, draw_up, freeze, newest, present
from pipeline.cohort.table import CohortSlide
from pipeline.config.base import fingerprint

SLIDES = [
    CohortSlide(
        f"s{n}", f"/s{n}.tif", f"p{n // 2}", "test" if n < 5 else "train", None, {"t": str(n % 2)}, {"site": "n"}
    )
    for n in range(7)
]
KEYS = {f"s{n}": f"key{n}" for n in range(7) if n != 3}  # s3 was not committed


def test_the_test_is_the_committed_slides_of_the_split_and_never_changes(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert newest(root) is None
    first = draw_up(1, "test", SLIDES, KEYS)
    assert sorted(case.key for case in first.cases) == ["key0", "key1", "key2", "key4"]
    assert draw_up(1, "test", SLIDES[::-1], KEYS) == first
    uri = freeze(root, first)
    text = Path(uri).read_text()
    assert "s0" not in text
    assert "p1" not in text
    freeze(root, replace(first, cases=first.cases[:1]))
    assert newest(root) == first
    assert newest(root).digest == first.digest  # type: ignore[union-attr]
    second = draw_up(2, "test", SLIDES[:2], KEYS)
    freeze(root, second)
    assert newest(root) == second
    assert second.digest != first.digest


def test_what_became_of_a_case_is_seen_and_its_label_stays() -> None:
    manifest = draw_up(1, "test", SLIDES, KEYS)
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
    cases = present(draw_up(1, "test", SLIDES, KEYS), SLIDES, KEYS)
    assert contaminated(cases, {"keys": ["key5"], "patients": [fingerprint("p3")]}) == []
    assert contaminated(cases, {"keys": ["key2"], "patients": []}) == [fingerprint("s2")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p0")]}) == sorted(map(fingerprint, ["s0", "s1"]))


def test_a_test_slide_whose_file_or_patient_is_now_one_that_was_learned_from_is_found() -> None:
    now = [replace(slide, patient_id="p9") if slide.slide_id == "s4" else slide for slide in SLIDES]
    cases = present(draw_up(1, "test", SLIDES, KEYS), now, {**KEYS, "s1": "another"})
    assert contaminated(cases, {"keys": ["another"], "patients": []}) == [fingerprint("s1")]
    assert contaminated(cases, {"keys": ["key1"], "patients": []}) == [fingerprint("s1")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p9")]}) == [fingerprint("s4")]
    assert contaminated(cases, {"keys": [], "patients": [fingerprint("p2")]}) == sorted(map(fingerprint, ["s4"]))
