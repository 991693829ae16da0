"""The command as a process: it says where it is, refuses what it cannot show, and ends when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StageError, StorageError
from pipeline.view.gate import TOKEN, gate
from pipeline.view.run import address, opened, serving, view
from tests.pipeline.view.made import grid, write_output
from tests.synth import tissue_rgb, write_pyramid


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    path = write_pyramid(folder / "a.tiff", tissue_rgb(613, 487))
    corners, size = grid(613, 487, 100, 100)
    slide = {
        "uri": path, "dimensions": (613, 487), "corners": corners, "size": size, "score": size / 100,
        "selected": size > 0,
    }  # fmt: skip
    return write_output(folder / "out", {"a": slide})


@contextmanager
def _command(*arguments: str, token: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command and the address that it prints."""
    command = [sys.executable, "-m", "pipeline", "view", *arguments, "--port", "0"]
    environment = {**os.environ, TOKEN: token}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_when_it_is_told_to_also_with_a_browser_connected(out: Path, signum: signal.Signals) -> None:
    with _command(str(out)) as (process, where):
        assert where.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(where + "slides", timeout=10) as answer:
            assert answer.status == 200
            process.send_signal(signum)
            _, said = process.communicate(timeout=10)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "view: ended" in said


@pytest.mark.slow
def test_beyond_loopback_the_address_has_a_token_which_is_not_logged(out: Path) -> None:
    with _command(str(out), "--host", "0.0.0.0") as (process, where):
        name = socket.gethostname().lower()
        assert where.startswith(f"http://{name}:")
        local = where.replace(name, "127.0.0.1", 1)
        assert len(where.partition("?token=")[2]) > 40
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"<title>" in opener.open(local, timeout=10).read()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
        assert where.partition("=")[2] not in said
        assert "unencrypted" in said
        assert f"where {name} is not known, put this machine's address there in its place" in said


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="neither the --out of predict nor a patch store"):
        opened(str(tmp_path))


def test_only_predictions_are_compared(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only two folders of predict"):
        view(str(out), str(tmp_path), host="127.0.0.1", port=0, tell=print)


def test_a_port_that_is_taken_is_named(out: Path) -> None:
    with (
        serving([opened(str(out))], gate("127.0.0.1", None)) as server,
        pytest.raises(StageError, match=rf"port {server.port}.*--port"),
    ):
        view(str(out), None, host="127.0.0.1", port=server.port, tell=print)


def test_nothing_is_left_when_the_block_ends(out: Path) -> None:
    before = set(threading.enumerate())
    with serving([opened(str(out))], gate("127.0.0.1", None)) as server:
        with urllib.request.urlopen(address(server) + "slides", timeout=10) as answer:
            assert answer.status == 200
        port = server.port
    assert {thread for thread in set(threading.enumerate()) - before if thread.name == "view"} == set()
    with pytest.raises(OSError, match=r"refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
