"""A real Ray head with its job server, as `ray start --head` makes one; and a line to it that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.processes import free_port

REPO = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str
    """Of its job server."""
    gcs: str
    """Address of the cluster: `auto` may find another one of this machine."""
    metrics_port: int
    process: subprocess.Popen[bytes]
    env: dict[str, str]

    def kill(self) -> None:
        """End all of it at once, as a lost machine would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in psutil.process_iter():  # drivers and workers have sessions of their own
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == self.env["RAY_TMPDIR"]:
                    process.kill()

    def kill_dashboard(self) -> None:
        """End the job server alone."""
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                words = " ".join(process.info["cmdline"] or ())
                if "dashboard/dashboard.py" in words and f"--port={self.address.rpartition(':')[2]}" in words:
                    process.kill()


@contextmanager
def serve_head(begin: Sequence[str] = ("ray", "start", "--head", "--block"), **more: str) -> Iterator[Head]:
    """A head of two CPUs on free ports, until the block ends; `more` is of its environment, and so of its jobs'."""
    short = tempfile.mkdtemp(prefix="ips", dir="/tmp")  # Ray's sockets allow 107 characters
    head, dashboard, client, agent, grpc, metrics = (free_port() for _ in range(6))
    env = {**os.environ, "RAY_TMPDIR": short, "PYTHONPATH": str(REPO), "RAY_AUTH_MODE": "disabled", **more}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    command = [
        *(str(Path(sys.executable).parent / begin[0]), *begin[1:], "--num-cpus=2"),
        *(f"--port={head}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--metrics-export-port={metrics}", "--object-store-memory=200000000", "--disable-usage-stats"),
    ]
    log = (Path(short) / "log").open("wb")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    made = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{head}", metrics, process, env)
    try:
        wait_for(f"{made.address}/api/version", 90, env.get("RAY_AUTH_TOKEN"))
        yield made
    finally:
        made.kill()
        log.close()
        shutil.rmtree(short, ignore_errors=True)


def wait_for(url: str, seconds: float, token: str | None = None) -> str:
    """What an address answers, once it does; `token` is of a cluster that asks for one."""
    deadline = time.monotonic() + seconds
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    while True:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            text: bytes = answer.read()
            return text.decode()
        assert time.monotonic() < deadline, url
        time.sleep(0.3)


@dataclass
class Line:
    """A TCP connection by way of this process."""

    target: tuple[str, int]
    server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    up: bool = True
    sockets: list[socket.socket] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it begins."""
        return f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections, and take no other."""
        self.up = False
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for one in self.sockets:
            one.close()
        self.sockets.clear()
        self.threads.clear()

    def mend(self) -> None:
        """Take connections again."""
        self.up = True

    def serve(self) -> None:
        """Until the server's socket is closed."""
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                if not self.up:
                    near.close()
                    continue
                far = socket.create_connection(self.target)
                self.sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    thread = threading.Thread(target=_copy, args=(one, other), daemon=True)
                    thread.start()
                    self.threads.append(thread)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def line_to(address: str) -> Iterator[Line]:
    """A line to a server of this machine."""
    line = Line(("127.0.0.1", int(address.rpartition(":")[2])))
    server = threading.Thread(target=line.serve, daemon=True)
    server.start()
    try:
        yield line
    finally:
        line.server.shutdown(socket.SHUT_RDWR)
        server.join()
        line.server.close()
        line.cut()
