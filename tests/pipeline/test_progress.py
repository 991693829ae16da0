from __future__ import annotations

import io
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from pipeline.progress import progress


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr("pipeline.progress.time.monotonic", clock)
    monkeypatch.setattr("pipeline.progress.on_terminal", lambda: False)
    caplog.set_level(logging.INFO, "pipeline")
    return clock


def test_short_steps_say_nothing(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    with progress("tile", 40, "slides") as steps:
        for _ in range(40):
            clock.now += 0.2
            steps.advance()
    assert caplog.messages == []


def test_a_line_says_how_far_how_fast_and_how_long(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    with progress("tile", 93_429, "patches of 1 large slides", start=3429) as steps:
        clock.now += 20
        steps.advance(30_000)
        clock.now += 5
        steps.advance(1)
        clock.now += 15
        steps.to(93_429)
    assert caplog.messages == [
        "tile: 33,429/93,429 patches of 1 large slides, 1,500 a second, 40 s left",
        "tile: 93,429/93,429 patches of 1 large slides, 2,250 a second",
    ]


def test_lines_are_few_however_long_it_takes(clock: _Clock, caplog: pytest.LogCaptureFixture) -> None:
    with progress("train", 864_000, "steps") as steps:
        for _ in range(86_400):  # ten days
            clock.now += 10
            steps.advance(10)
    assert 2880 <= len(caplog.messages) <= 3000
    (half,) = [line for line in caplog.messages if "120.0 h left" in line]
    assert half.startswith("train: 43")
    assert "/864,000 steps, 1 a second, " in half


def test_a_terminal_gets_bars_of_all_steps_at_once_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("pipeline.progress.CONSOLE", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr("pipeline.progress.on_terminal", lambda: True)

    def work(name: str) -> None:
        with progress(name, 1000, "patches") as steps:
            for _ in range(50):
                steps.advance(10)
            steps.to(600, 2000)

    with progress("tile", 3, "slides") as outer, ThreadPoolExecutor(3) as pool:
        for _ in pool.map(work, ("a", "b", "c")):
            outer.advance()
    shown = screen.getvalue()
    assert "tile (slides)" in shown
    assert shown.endswith("\x1b[?25h") or "\x1b[2K" in shown[-40:]  # the cursor is back, the bars are wiped
    from pipeline.progress import _bars

    assert _bars._shown is None
