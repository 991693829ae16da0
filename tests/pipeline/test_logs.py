from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from pipeline.logs import FIELDS, JsonLines, about, context, log_as_json, within

_SECRET = "PlantedPa55word"


@pytest.fixture(autouse=True)
def _about_nothing() -> None:
    """A run that another test began is its own."""
    about(**dict.fromkeys(FIELDS))


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream, logger = io.StringIO(), logging.getLogger("tests.lines")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger, stream
    logger.removeHandler(handler)


def test_a_line_is_one_object_that_says_what_it_is_about(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = lines
    with within(run="r1", stage="tile"):
        logger.warning('%s is\n"bad" ü', "a", extra={"slide": "a-01"})
        with within(stage="train", rank=0):
            logger.info("on")
        logger.info("back")
    logger.info("out")
    first, second, third, last = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["event"] == 'a is\n"bad" ü'
    assert (first["run"], first["stage"], first["slide"], first["level"]) == ("r1", "tile", "a-01", "warning")
    assert first["time"].endswith("+00:00")
    assert (second["run"], second["stage"], second["rank"]) == ("r1", "train", 0)
    assert third["stage"] == "tile"
    assert "rank" not in third
    assert set(last) == {"time", "level", "event"}


def test_no_credential_gets_out_even_in_a_trace(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = lines
    try:
        raise RuntimeError(f"no answer from http://u:{_SECRET}@host")
    except RuntimeError:
        logger.exception("at http://u:%s@host", _SECRET)
    (line,) = stream.getvalue().splitlines()
    assert _SECRET not in line
    assert "RuntimeError: no answer from http://***@host" in json.loads(line)["trace"]


def test_what_it_is_about_lasts_as_long_as_said() -> None:
    about(run="r")
    with within(stage="s", run="inner"):
        about(rank=3)
    assert context() == {"run": "r", "rank": 3}
    about(run=None, rank=None)
    assert context() == {}


def test_a_worker_s_lines_have_the_invocation_s_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IPS_RUN", "parent")
    monkeypatch.setenv("IPS_LOG_FORMAT", "json")
    logger = logging.getLogger("pipeline")
    before = logger.handlers, logger.propagate, logger.level
    try:
        log_as_json(stage="train", rank=1)
        logging.getLogger("pipeline.training.session").info("epoch 1")
    finally:
        logger.handlers, logger.propagate, _ = before
        logger.setLevel(before[2])
        about(run=None, stage=None, rank=None)
    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (line["run"], line["rank"], line["event"]) == ("parent", 1, "epoch 1")


def test_a_thousand_slides_worth_of_lines_is_small(lines: tuple[logging.Logger, io.StringIO]) -> None:
    """20 kinds of faults, 5 slides each are told; the rest are counted. Even a line for each slide stays small."""
    logger, stream = lines
    with within(run="0" * 32, stage="tile"):
        for number in range(1000):
            logger.warning("tile: slide-%06d is quarantined: %s", number, "x" * 300, extra={"slide": f"slide-{number}"})
    assert len(stream.getvalue()) < 5_000_000 / 5
