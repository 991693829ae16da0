"""What is read, how often, and for whom."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from pipeline.sweep.passes import readings
from tests.pipeline.sweep.made import made_cells, made_cohort

GIB = 2**30


def test_one_reading_for_all_that_share_a_tiling() -> None:
    cells = made_cells(made_cohort(5), ["a", "b"], memory=(3, 4))
    (one,) = readings(cells, defaultdict(set), 1.0, "store")
    assert one.models == ("a", "b")
    assert [task.source for task in one.tasks] == [f"source{i}" for i in range(5)]
    assert all(len(task.wanted) == 4 for task in one.tasks)
    assert one.bytes == 2 * 2 * 100  # each model once, whatever its settings, and its scoring copy


def test_what_is_done_is_not_read_and_nothing_is_nothing() -> None:
    cells = made_cells(made_cohort(5), ["a", "b"])
    done = {cells[0].scoring.digest: {f"source{i}" for i in range(5)}, cells[1].scoring.digest: {"source1"}}
    (one,) = readings(cells, done, 1.0, None)
    assert one.models == ("b",)
    assert [task.source for task in one.tasks] == ["source0", "source2", "source3", "source4"]
    done[cells[1].scoring.digest] = done[cells[0].scoring.digest]
    assert readings(cells, done, 1.0, None) == []


def test_a_slide_of_two_cohorts_is_read_once() -> None:
    whole, part = made_cohort(5), made_cohort(3, "part")
    first, second = made_cells(whole, ["a"])[0], made_cells(part, ["a"])[0]
    (one,) = readings([first, second], defaultdict(set), 1.0, None)
    assert len(one.tasks) == 5


def test_models_are_packed_into_the_memory_that_there_is() -> None:
    cells = [
        replace(cell, scoring=replace(cell.scoring, model=replace(cell.scoring.model, bytes=GIB)))
        for cell in made_cells(made_cohort(3), ["a", "b", "c"], memory=(3, 4))
    ]
    assert [one.models for one in readings(cells, defaultdict(set), 4.5, None)] == [("a", "b"), ("c",)]
    assert [one.models for one in readings(cells, defaultdict(set), 0.5, None)] == [("a",)] * 2 + [("b",)] * 2 + [
        ("c",)
    ] * 2
