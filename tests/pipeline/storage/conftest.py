from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The objects of a server that answers conditions as AWS documents it: 412 where another is there, 404 if none is.

    Where another one writes `raced` just before it is written, and a header is refused for `refuses`.
    """
    objects: dict[str, bytes] = {}
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients ask whether to go on

        def _answer(self, status: int, body: bytes = b"", of: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", _tag(of))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            found = objects.get(self.path.partition("?")[0])
            self._answer(404, _error("NoSuchKey")) if found is None else self._answer(200, found, found)

        def do_PUT(self) -> None:
            data, path = self.rfile.read(int(self.headers["Content-Length"])), self.path.partition("?")[0]
            absent, same = self.headers["If-None-Match"], self.headers["If-Match"]
            with one_at_a_time:
                if path.endswith("raced"):
                    objects.setdefault(path, b"another one's")
                if path.endswith("refuses") and (absent or same):
                    self._answer(501, _error("NotImplemented"))
                elif same and path not in objects:
                    self._answer(404, _error("NoSuchKey"))
                elif (absent == "*" and path in objects) or (same and same != _tag(objects[path])):
                    self._answer(412, _error("PreconditionFailed"))
                else:
                    objects[path] = data
                    self._answer(200, of=data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        places = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
        keys = {"AWS_ACCESS_KEY_ID": "AKIAIPSTESTKEY000001", "AWS_SECRET_ACCESS_KEY": "only-for-the-test"}
        for name, value in (places | keys).items():
            monkeypatch.setenv(name, value)
        yield objects
        running.shutdown()
        thread.join()


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
