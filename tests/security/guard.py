"""A tracking server behind a proxy that asks for a password, as companies run it."""

from __future__ import annotations

import base64
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def credentials(user: str, password: str) -> str:
    """As the header of a request holds them."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@contextmanager
def guarded(target: str, user: str, password: str) -> Iterator[str]:
    """The address of a proxy in front of `target`: 401 without the password."""
    wanted = f"Basic {credentials(user, password)}"

    class Proxy(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("authorization") != wanted:
                self._answer(401, b"{}", "application/json")
                return
            headers = {"content-type": self.headers.get("content-type", "application/json")}
            request = urllib.request.Request(target + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    self._answer(reply.status, reply.read(), reply.headers.get("content-type", ""))
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.read(), error.headers.get("content-type", ""))

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Proxy, f"do_{method}", Proxy._forward)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
