"""A proxy before an S3 server that does what networks and servers do on a bad day."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Literal
from urllib.parse import urlsplit

Fault = Literal["busy", "reset", "silent", "short"]
"""503 with SlowDown; a reset before the answer; no answer; half of the body."""

_BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'


@dataclass
class Faults:
    """What happens to each request: `choose(method, path)` names a fault, or None for none."""

    endpoint: str
    """What the client is told."""
    upstream: str
    """The server's own; may be changed while requests come."""
    choose: Callable[[str, str], Fault | None] = lambda method, path: None
    instead: Callable[[str, str], bytes | None] = lambda method, path: None
    """A body that is answered in the server's stead, or None: it is asked."""
    seen: list[tuple[str, str, Fault | None]] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Path and length of each body that answered a GET."""
    hold_s: float = 1.0
    """How long a silent server is silent."""

    def times(self, fault: Fault, count: int, method: str = "", part: str = "") -> None:
        """Spoil the next `count` requests of a method whose path holds `part`."""
        left = [count]

        def choose(verb: str, path: str) -> Fault | None:
            if left[0] > 0 and method in ("", verb) and part in path:
                left[0] -= 1
                return fault
            return None

        self.choose = choose

    def every(self, fault: Fault, period: int) -> None:
        """Spoil each period-th request."""
        count = [0]

        def choose(method: str, path: str) -> Fault | None:
            count[0] += 1
            return fault if count[0] % period == 0 else None

        self.choose = choose

    @property
    def spoilt(self) -> int:
        """How many requests met a fault."""
        return sum(fault is not None for _, _, fault in self.seen)


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[Faults]:
    """Stand before the server at `endpoint` until the block ends; the client's signature stays valid."""
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    proxy.daemon_threads = True
    faults = Faults(f"http://127.0.0.1:{proxy.server_address[1]}", endpoint)
    _Handler.known[proxy.server_address[1]] = faults
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        proxy.shutdown()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    known: ClassVar[dict[int, Faults]] = {}
    """By the proxy's port: the server makes its handlers itself."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _serve(self) -> None:
        faults = self.known[self.connection.getsockname()[1]]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = faults.choose(self.command, self.path)
        faults.seen.append((self.command, self.path, fault))
        if fault == "busy":
            self._answer(503, "Slow Down", [("Content-Type", "application/xml")], _BUSY)
        elif fault == "reset":
            self._reset()
        elif fault == "silent":
            time.sleep(faults.hold_s)
            self.close_connection = True
        elif (known := faults.instead(self.command, self.path)) is not None:
            self._answer(200, "OK", [("Content-Type", "application/xml")], known)
        else:
            self._forward(faults, body, short=fault == "short")

    def _forward(self, faults: Faults, body: bytes, *, short: bool) -> None:
        connection = http.client.HTTPConnection(urlsplit(faults.upstream).netloc, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):  # the server is down
            faults.seen.append((self.command, self.path, "reset"))
            self._reset()
            return
        finally:
            connection.close()
        if self.command == "GET":
            faults.sent.append((self.path, len(data)))
        headers = [item for item in answer.getheaders() if item[0].lower() not in ("transfer-encoding", "connection")]
        part = answer.status == 200 and answer.getheader("Content-Range")  # so rclone answers; HTTP says 206
        status = 206 if part else answer.status
        self._answer(status, answer.reason, headers, data, short=short)

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, *, short: bool = False
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if short else data)
        if short:
            self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815
