from __future__ import annotations

import pickle
import signal

import pytest

from pipeline import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("config x", ["a.b: wrong", "c: missing"]), 2),
        (errors.CohortError("c.csv", ["row 3: no label"]), 2),
        (errors.SlideError("no-tissue", "s.svs: no tissue"), 1),
        (errors.BadTileError("bad-tile", "tile 3"), 1),
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


def test_a_listed_error_shows_every_problem() -> None:
    text = str(errors.ConfigError("config x", ["a.b: wrong", "c: missing"]))
    assert text == "config x: 2 problems\n  - a.b: wrong\n  - c: missing"
