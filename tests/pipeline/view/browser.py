"""A real browser for the tests: Chromium without a window, steered by its driver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

WIDTH, HEIGHT = 1440, 900


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A new session; skips where Chromium or its driver is not installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "force-device-scale-factor=1",
    ):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        session.set_window_size(WIDTH, HEIGHT)
        yield session
    finally:
        session.quit()


def until(found: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.03)
    return value


def shown(session: webdriver.Chrome, slide_id: str) -> None:
    """Wait until a slide is shown, and all its tiles are drawn."""
    until(lambda: session.execute_script("return document.documentElement.dataset.shown") == slide_id, slide_id)
    settled(session)


def settled(session: webdriver.Chrome) -> None:
    """Wait until nothing moves and every tile is there."""
    until(lambda: session.execute_script("return window.settled?.()"), "the picture to settle")
    time.sleep(0.1)


def press(session: webdriver.Chrome, keys: str) -> None:
    """Type keys into the page."""
    session.find_element(By.TAG_NAME, "body").send_keys(keys)


def complaints(session: webdriver.Chrome) -> list[str]:
    """What the console said since the last look."""
    return [f"{entry['level']}: {entry['message']}" for entry in logged(session, "browser")]


def logged(session: webdriver.Chrome, kind: str) -> list[Any]:
    """Entries of a log since the last look."""
    entries: list[Any] = session.get_log(kind)  # type: ignore[no-untyped-call]
    return entries
