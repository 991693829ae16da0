from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ReleaseError
from pipeline.release.history import Act, acts, append, last_act, taken_back


def _act(champion: str, was: str | None) -> Act:
    return Act("promote", "m", was, champion, was, None, champion, "d" + champion, ("every rule is met",), "retrain")


def test_acts_follow_each_other_and_come_back_as_they_were_written(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert (acts(root, "m"), last_act(root, "m")) == ([], None)
    first = append(root, _act("1", None), None)
    second = append(root, _act("2", "1"), first)
    assert (first.number, second.number) == (1, 2)
    assert acts(root, "m") == [first, second]
    assert last_act(root, "m") == second
    assert last_act(root, "another") is None
    assert sorted(path.name for path in (tmp_path / "release" / "history" / "m").iterdir()) == [
        "000001.json",
        "000002.json",
    ]


def test_more_than_nine_acts_keep_their_order(tmp_path: Path) -> None:
    before = None
    for number in range(12):
        before = append(str(tmp_path), _act(str(number + 1), None), before)
    assert [act.champion for act in acts(str(tmp_path), "m")] == [str(number + 1) for number in range(12)]


def test_of_two_acts_that_follow_one_the_second_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    first = append(root, _act("1", None), None)
    second = append(root, _act("2", "1"), first)
    with pytest.raises(ReleaseError, match="000002.json was written by another process"):
        append(root, _act("2", "1"), first)  # even of the same words
    assert acts(root, "m") == [first, second]
    assert first.name != second.name


def test_who_was_taken_back_stays_so_until_a_person_lets_it_in_again() -> None:
    def act(kind: str, was: str | None, champion: str, train: str | None = None) -> Act:
        return replace(_act(champion, was), kind=kind, train=train, by="ada", at="2026-01-02T03:04:05")  # type: ignore[arg-type]

    done = [act("promote", None, "1", "t1"), act("promote", "1", "2", "t2"), act("rollback", "2", "1")]
    found = taken_back(done)
    assert set(found) == {"2", "t2"}
    assert found["t2"] == "version 2 was taken back by ada on 2026-01-02: every rule is met"
    assert set(taken_back([*done, act("promote", "1", "3", "t3")])) == {"2", "t2"}
    assert taken_back([*done, act("approve", "1", "2", "t2")]) == {}
    assert taken_back([*done, act("approve", "1", "5", "t2")]).keys() == {"2"}  # the same weights, entered again
    assert set(taken_back([*done, act("rollback", "1", "2")])) == {"1", "t1"}
    assert set(taken_back([act("adopt", "1", "1"), act("approve", "1", "2"), act("rollback", "2", "1")])) == {"2"}
