"""Programs of the tests that are up until a block ends: MLflow's servers, on free ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_MLFLOW = (sys.executable, "-m", "mlflow")


def free_port() -> int:
    """A port of the loopback that nobody holds at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serve_mlflow(folder: Path) -> Iterator[str]:
    """A tracking server that keeps all it has in `folder`; gives its address."""
    port = free_port()
    places = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "served")]
    command = [*_MLFLOW, "server", "--port", str(port), "--workers", "1", *places]
    with running(command, folder, f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serve_model(model: str, folder: Path, env: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """`mlflow models serve` of a model, as on a host of its own; gives the address that answers, and its process."""
    port = free_port()
    command = [*_MLFLOW, "models", "serve", "--model-uri", model, "--env-manager", "local", "--port", str(port)]
    command += ["--timeout", "600"]  # however busy the machine is
    with running(command, folder, f"http://127.0.0.1:{port}/ping", env) as process:
        yield f"http://127.0.0.1:{port}/invocations", process


@contextmanager
def running(command: Sequence[str], folder: Path, health: str, env: Mapping[str, str] | None = None) -> Iterator[int]:
    """A command from when it is healthy, and its process; its log is `folder`/log.

    MLflow's start helpers, so the whole session is ended.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of the programs that MLflow starts
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path, **(env or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not _answers(health):
            said = (folder / "log").read_text()
            assert server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        yield server.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1):
        return True
    return False
