from __future__ import annotations

from pathlib import Path

from pipeline.release.history import Act, acts, append, last_act


def _act(champion: str, was: str | None) -> Act:
    return Act("promote", "m", was, champion, was, None, champion, "d" + champion, ("every rule is met",), "retrain")


def test_acts_follow_each_other_and_come_back_as_they_were_written(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert (acts(root, "m"), last_act(root, "m")) == ([], None)
    first = append(root, _act("1", None))
    second = append(root, _act("2", "1"))
    assert (first.number, second.number) == (1, 2)
    assert acts(root, "m") == [first, second]
    assert last_act(root, "m") == second
    assert last_act(root, "another") is None
    assert sorted(path.name for path in (tmp_path / "release" / "history" / "m").iterdir()) == [
        "000001.json",
        "000002.json",
    ]


def test_more_than_nine_acts_keep_their_order(tmp_path: Path) -> None:
    for number in range(12):
        append(str(tmp_path), _act(str(number + 1), None))
    assert [act.champion for act in acts(str(tmp_path), "m")] == [str(number + 1) for number in range(12)]
