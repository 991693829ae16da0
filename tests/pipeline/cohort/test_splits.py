"""Who trains and who tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st

from pipeline.cohort.splits import check_apart, check_trainable, with_splits
from pipeline.cohort.table import SPLITS, Cohort, CohortSlide
from pipeline.config.data import SplitConfig, TaskConfig
from pipeline.errors import CohortError

TUMOR = TaskConfig(name="tumor", column="label")


def make(labels: Sequence[str | None], patients: Sequence[str], split: str | None = None) -> Cohort:
    slides = [
        CohortSlide(f"s{i}", f"/s{i}", patient, split, None, {"tumor": label}, {})
        for i, (label, patient) in enumerate(zip(labels, patients, strict=True))
    ]
    return Cohort("cohort.csv", tuple(slides))


def test_what_can_be_trained_on() -> None:
    good = with_splits(make(["0", "1"] * 20, [str(i) for i in range(40)]), SplitConfig(), 0)
    check_trainable(good, [TUMOR])
    with pytest.raises(CohortError) as caught:
        check_trainable(make(["1", None, "1"], ["a", "b", "c"], "train"), [TUMOR])
    assert caught.value.problems == (
        "task tumor: split train has only class '1' in column 'label', from which nothing can be learned or "
        "measured; add slides of the other classes of '0', '1'",
        "split test has no slide (train 3, val 0, test 0); add slides, a split column, or change cohort.split or seed",
    )
    check_trainable(make(["1", "0"], ["a", "b"], "train"), [TUMOR], splits=["train"])
    with pytest.raises(CohortError, match="split train has no slide"):
        check_trainable(make(["1", "0"], ["a", "b"], "test"), [TUMOR])


def test_given_splits_stay() -> None:
    cohort = make(["0", "1"], ["a", "b"], "val")
    assert with_splits(cohort, SplitConfig(), 0) is cohort


patients_of = st.lists(st.integers(0, 30), min_size=1, max_size=60)
shares = st.sampled_from([(0.6, 0.15, 0.25), (0.8, 0.0, 0.2), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.05, 0.9, 0.05)])


@hypothesis.given(owners=patients_of, later=patients_of, fractions=shares, seed=st.integers(0, 3), data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_split_is_of_seed_and_patient_alone(
    owners: list[int], later: list[int], fractions: tuple[float, float, float], seed: int, data: st.DataObject
) -> None:
    config = SplitConfig(train=fractions[0], val=fractions[1], test=fractions[2])
    cohort = make([None] * len(owners), [f"p{number}" for number in owners])
    split = with_splits(cohort, config, seed)
    assert [replace(slide, split=None) for slide in split.slides] == list(cohort.slides)
    home = {slide.patient_id: slide.split for slide in split.slides}
    assert all(home[slide.patient_id] == slide.split for slide in split.slides)
    used = {name for name, share in zip(SPLITS, fractions, strict=True) if share > 0}
    assert set(home.values()) <= used

    rows = data.draw(st.permutations([*owners, *later]))
    grown = with_splits(make(["1"] * len(rows), [f"p{number}" for number in rows]), config, seed)
    assert {slide.patient_id: slide.split for slide in grown.slides}.items() >= home.items()


def test_one_more_slide_moves_nobody() -> None:
    """By ranks within a class, as splits were drawn once, the 21st slide took a patient out of train into test."""
    for seed in range(20):
        before, after = (
            with_splits(make(["0", "1"] * 10 + ["1"] * more, [f"p{i}" for i in range(20 + more)]), SplitConfig(), seed)
            for more in (0, 1)
        )
        assert before.slides == after.slides[:20]


def test_large_splits_have_their_shares_and_follow_the_seed() -> None:
    cohort = make(["1" if i % 4 == 0 else "0" for i in range(4000)], [f"p{i}" for i in range(4000)])
    splits = [with_splits(cohort, SplitConfig(), seed) for seed in (0, 1)]
    for split in splits:
        for label, total in ((None, 4000), ("1", 1000)):
            sizes = {n: sum(label in (None, s.labels["tumor"]) for s in split.subset(n)) for n in SPLITS}
            for name, share in (("train", 0.6), ("val", 0.15), ("test", 0.25)):
                assert abs(sizes[name] - share * total) < 4 * (share * (1 - share) * total) ** 0.5
    same = sum(a.split == b.split for a, b in zip(splits[0].slides, splits[1].slides, strict=True))
    assert 1650 < same < 1910  # of independent splits: 4000 * (0.6^2 + 0.15^2 + 0.25^2) = 1780


def test_another_share_of_val_moves_nobody_into_or_out_of_the_test() -> None:
    cohort = make([None] * 500, [f"p{i}" for i in range(500)])
    tests = [
        {s.patient_id for s in with_splits(cohort, SplitConfig(train=0.75 - val, val=val, test=0.25), 0).subset("test")}
        for val in (0.0, 0.15, 0.75)
    ]
    assert tests[0] == tests[1] == tests[2]
    assert 90 < len(tests[0]) < 165


def test_one_file_under_two_ids_stands_in_one_split() -> None:
    cohort = make(["0", "1", "1", "0"], ["a", "b", "c", "d"])
    slides = [
        replace(slide, split=split)
        for slide, split in zip(cohort.slides, ("train", "test", "train", "val"), strict=True)
    ]
    apart = replace(cohort, slides=tuple(slides))
    check_apart(apart)
    check_apart(apart, {"s0": "k", "s2": "k", "s1": "other"})  # both of train, and one that was not committed
    twice = replace(apart, slides=(*slides[:3], replace(slides[3], uri="/s0")))
    with pytest.raises(CohortError) as caught:
        check_apart(twice)
    assert caught.value.problems == (
        "slides 's0' (train) and 's3' (val) are the same file; remove all but one, or give them one patient_id",
    )
    sections = [replace(slide, uri="/glass", series=number) for number, slide in enumerate(apart.slides)]
    check_apart(replace(apart, slides=tuple(sections)))
    with pytest.raises(CohortError, match=r"slides 's0' \(train\) and 's1' \(test\) are the same file"):
        check_apart(replace(apart, slides=(sections[0], replace(sections[1], series=0), *sections[2:])))
    with pytest.raises(CohortError, match=r"slides 's1' \(test\) and 's2' \(train\) are copies of one image; remove"):
        check_apart(apart, {"s0": "k", "s1": "k2", "s2": "k2", "s3": "k3"})
    check_apart(make(["0", "1"], ["a", "b"]), {"s0": "k", "s1": "k"})  # no splits yet
