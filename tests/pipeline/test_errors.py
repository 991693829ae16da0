from __future__ import annotations

import pickle
import signal
from collections.abc import Callable

import pytest

from pipeline import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("config x", ["a.b: wrong", "c: missing"]), 2),
        (errors.CohortError("c.csv", ["row 3: no label"]), 2),
        (errors.SlideError("no-tissue", "s.svs: no tissue"), 1),
        (errors.BadTileError("bad-tile", "tile 3"), 1),
        (errors.PlanError("0a1b", "s.svs: the patch of row 3"), 1),
        (errors.DataBudgetError("2 of 4"), 3),
        (errors.ResourceError("no GPU"), 5),
        (errors.Interrupted(signal.SIGTERM), 143),
        (errors.Interrupted(signal.SIGINT), 130),
    ],
)
def test_errors_cross_process_borders_with_message_and_code(error: errors.PipelineError, code: int) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.exit_code == code
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (errors.StorageError("away"), True),
        (errors.TrackingError("away"), True),
        (errors.SlideError("source", "s.svs: the line is dead"), True),
        (errors.SlideError("cache", "no room on this node"), True),
        (errors.SlideError("changed", "s.svs: replaced"), False),
        (errors.BadTileError("bad-tile", "tile 3"), False),
        (errors.PlanError("0a1b", "s.svs: the patch of row 3"), False),
        (errors.DamagedError("part 3 is damaged"), False),
        (errors.StageError("the loss became nan"), False),
        (errors.ConfigError("config x", ["a.b: wrong"]), False),
        (errors.DataBudgetError("2 of 4"), False),
        (errors.ResourceError("no GPU"), False),
    ],
)
def test_only_what_is_away_may_pass(error: errors.PipelineError, *, may: bool) -> None:
    assert pickle.loads(pickle.dumps(error)).may_pass is may


def test_a_listed_error_shows_every_problem() -> None:
    text = str(errors.ConfigError("config x", ["a.b: wrong", "c: missing"]))
    assert text == "config x: 2 problems\n  - a.b: wrong\n  - c: missing"


@pytest.mark.parametrize(
    "make",
    [
        errors.StorageError,
        errors.TrackingError,
        lambda text: errors.SlideError("source", text),
        lambda text: errors.PlanError("0a1b", text),
        lambda text: errors.ConfigError(text, [text]),
        lambda text: errors.CohortError(text, [text]),
    ],
)
def test_no_message_holds_a_credential(make: Callable[[str], errors.PipelineError]) -> None:
    error = make("the endpoint (http://svc:Pa55@minio:9000) is away")
    for kept in (error, pickle.loads(pickle.dumps(error))):
        assert "the endpoint (http://***@minio:9000) is away" in str(kept)
        assert "Pa55" not in f"{kept!r} {vars(kept)}"
