from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.release import notify
from pipeline.release.notify import send_unsent, tell
from tests.processes import free_port


@dataclass
class Server:
    """What it was asked, and what it answers, in that order; 200 when that is used up."""

    url: str
    answers: list[int]
    asked: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _serve(answers: list[int]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.asked.append((dict(self.headers), body))
            answer = found.answers.pop(0) if found.answers else 200
            if answer < 0:  # a byte now and then, for ever
                while not found.ended.wait(0.02):
                    with suppress(OSError):
                        self.wfile.write(b"H")
                return
            if answer < 100:
                self.wfile.write(b"no HTTP\r\n\r\n")
                return
            self.send_response(answer)
            if answer in (301, 302, 303):
                self.send_header("Location", "/new")
            self.end_headers()

        def do_GET(self) -> None:
            found.asked.append((dict(self.headers), b""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Server(f"http://127.0.0.1:{server.server_port}/hook", answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.delenv(notify.SECRET, raising=False)


def test_the_server_gets_the_json_once_and_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.SECRET, "a secret")
    with _serve([]) as server:
        tell(str(tmp_path), server.url, {"outcome": "promoted"})
        send_unsent(str(tmp_path), server.url)
    ((headers, body),) = server.asked
    assert json.loads(body) == {"outcome": "promoted"}
    assert headers["X-Signature-256"] == "sha256=" + hmac.new(b"a secret", body, hashlib.sha256).hexdigest()
    assert headers["Content-Type"] == "application/json"
    assert (tmp_path / "release" / "latest.json").read_bytes() == body
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["latest.json"]


@pytest.mark.parametrize(("answers", "asked", "kept"), [
    ([503, 500], 3, 0), ([429, 408, 502], 4, 0), ([404], 1, 1), ([500] * 4, 4, 1), ([301], 1, 1), ([302], 1, 1),
])  # fmt: skip
def test_it_is_tried_again_where_that_may_help(
    answers: list[int],
    asked: int,
    kept: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with _serve(answers) as server, caplog.at_level(logging.WARNING, "pipeline"):
        tell(str(tmp_path), server.url, {"outcome": "held"})
        assert len(server.asked) == asked
        assert (tmp_path / "release" / "unsent.json").exists() == kept
        assert ("did not take the result (HTTP" in caplog.text) == kept
        send_unsent(str(tmp_path), server.url)  # by the next retraining, when the server is well again
        assert len(server.asked) == asked + kept
    assert len({body for _, body in server.asked}) == 1
    assert not (tmp_path / "release" / "unsent.json").exists()


def test_a_server_that_is_away_is_no_failure(tmp_path: Path) -> None:
    tell(str(tmp_path), f"http://127.0.0.1:{free_port()}/", {"outcome": "held"})
    assert (tmp_path / "release" / "unsent.json").read_bytes() == (tmp_path / "release" / "latest.json").read_bytes()
    tell(str(tmp_path), None, {"outcome": "rejected"})
    assert json.loads((tmp_path / "release" / "latest.json").read_bytes()) == {"outcome": "rejected"}


def test_an_answer_that_is_no_http_is_no_failure_of_the_retraining(tmp_path: Path) -> None:
    with _serve([0] * 4) as server:
        tell(str(tmp_path), server.url, {"outcome": "promoted"})
        assert len(server.asked) == 4
        assert (tmp_path / "release" / "unsent.json").exists()
        send_unsent(str(tmp_path), server.url)
    assert not (tmp_path / "release" / "unsent.json").exists()


def test_an_answer_that_drips_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "DEADLINE_S", 0.3)
    with _serve([-1]) as server, caplog.at_level(logging.WARNING, "pipeline"):
        tell(str(tmp_path), server.url, {"outcome": "promoted"})  # returns, where it once did not
        assert len(server.asked) == 1
    assert "did not take the result (it had not answered 0.3 s after it was first asked)" in caplog.text
    assert (tmp_path / "release" / "unsent.json").exists()


@pytest.mark.parametrize("url", ["http://[bad/", "http://host:port/", "http://example.org/a b"])
def test_what_is_no_url_is_no_failure_of_the_retraining(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipeline"):
        tell(str(tmp_path), url, {"outcome": "promoted"})
    assert f"notify.url: {url} did not take the result" in caplog.text
    assert (tmp_path / "release" / "unsent.json").exists()
