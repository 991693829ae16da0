"""The server as anybody on its port meets it."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.view
from pipeline.view.gate import gate
from pipeline.view.outputs import Output
from pipeline.view.run import serving
from pipeline.view.server import CONNECTIONS, ViewServer, _files
from tests.pipeline.view.made import grid, write_output
from tests.synth import tissue_rgb, write_pyramid

SECRET = "a token of the tests"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("view")
    path = write_pyramid(folder / "a.tiff", tissue_rgb(2213, 1787))
    corners, size = grid(2213, 1787, 224, 224)
    score = corners[:, 0] / corners[:, 0].mean()
    slide = {
        "uri": path,
        "dimensions": (2213, 1787),
        "corners": corners,
        "size": size,
        "score": score,
        "selected": score > 1.5,
    }
    return Output(str(write_output(folder / "out", {"a": slide})))


@pytest.fixture(scope="module")
def server(out: Output) -> Iterator[ViewServer]:
    with serving([out], gate("127.0.0.1", None)) as server:
        yield server


@contextmanager
def _connected(server: ViewServer) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def _ask(server: ViewServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    with _connected(server) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def _said(server: ViewServer) -> Any:
    return json.loads(_ask(server, "/slides")[2])


def test_every_answer_has_the_headers_that_keep_others_out(server: ViewServer) -> None:
    tag = _said(server)["tag"]
    for path in ("/", "/static/app.js", "/slides", f"/{tag}/0", f"/{tag}/0/tile/0/0/0", "/nothing", f"/{tag}/9"):
        _, headers, _ = _ask(server, path, Origin="http://evil.example")
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control") or name in ("server", "date")]


def test_tiles_are_kept_by_browsers_and_lists_are_not(server: ViewServer) -> None:
    tag = _said(server)["tag"]
    status, headers, data = _ask(server, f"/{tag}/0/tile/2/0/0")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert "immutable" in headers["cache-control"]
    assert data[:3] == b"\xff\xd8\xff"
    assert _ask(server, "/slides")[1]["cache-control"] == "no-store"
    _, page, _ = _ask(server, "/static/app.js")
    assert _ask(server, "/static/app.js", If_None_Match=page["etag"])[0] == 304


def test_head_is_get_without_its_body(server: ViewServer) -> None:
    status, headers, data = _ask(server, "/static/app.js", "HEAD")
    assert (status, data) == (200, b"")
    assert int(headers["content-length"]) == len(_files()["app.js"])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"])
def test_nothing_but_get_and_head_is_answered(server: ViewServer, method: str) -> None:
    status, headers, _ = _ask(server, "/", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "localhost.evil.example"])
def test_another_host_is_refused(server: ViewServer, host: str) -> None:
    assert _ask(server, "/", Host=host)[0] == 421
    assert _ask(server, "/slides", Host=host)[2] == b"this server does not go by that name"


def test_a_number_of_an_earlier_server_means_nothing(server: ViewServer) -> None:
    assert _ask(server, "/0123456789abcdef/0/tile/0/0/0")[0] == 410


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 150 + b"\r\n", 431),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_requests_that_browsers_do_not_make(server: ViewServer, raw: bytes, status: int) -> None:
    assert _raw(server, raw).startswith(b"HTTP/1.1 %d " % status)


def _raw(server: ViewServer, data: bytes) -> bytes:
    """What comes back for these bytes, after which the sender is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before it was all sent
        found = b""
        try:
            while part := sock.recv(65536):
                found += part
        except ConnectionError:
            pass
        return found


_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"GET / HTTP/1.1", b"Host: localhost", b"Host: evil.example", b"Cookie: a=b", b"", b"Range: bytes=0-"]
        ),
        st.binary(max_size=80),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=_LINES)
def test_any_bytes_get_an_answer_or_none_and_the_server_lives(server: ViewServer, lines: list[bytes]) -> None:
    answer = _raw(server, b"\r\n".join(lines) + b"\r\n\r\n")
    assert answer == b"" or re.match(rb"HTTP/1\.1 (200|400|404|405|408|414|421|431|505) ", answer), answer[:80]
    assert b"Traceback" not in answer
    assert _ask(server, "/slides")[0] == 200


def test_a_network_needs_the_token_once_and_then_the_session(out: Output) -> None:
    with serving([out], gate("127.0.0.1", SECRET)) as server:
        for path in ("/", "/slides", "/static/app.js", "/?token=", "/?token=wrong", f"/slides?token={SECRET}"):
            assert _ask(server, path.replace(" ", "+"))[0] == 401
        status, headers, _ = _ask(server, "/?token=" + SECRET.replace(" ", "+"))
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert SECRET not in cookie
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
        assert _ask(server, "/slides", Cookie=cookie.partition(";")[0])[0] == 200
        assert _ask(server, "/slides", Cookie=cookie.partition("=")[0] + "=guess")[0] == 401


def test_two_hundred_tiles_in_flight_take_few_handles_and_all_arrive(server: ViewServer) -> None:
    tag = _said(server)["tag"]
    steps = json.loads(_ask(server, f"/{tag}/0")[2])["steps"]
    paths = [
        f"/{tag}/0/tile/{step}/{column}/{row}"
        for step, one in enumerate(steps)
        for column in range(one["columns"])
        for row in range(one["rows"])
    ]
    paths = (paths * (200 // len(paths) + 1))[:200]
    process, together = psutil.Process(), threading.Barrier(200)
    before = process.num_fds()

    def get(path: str) -> int:
        together.wait(30)
        status, _, data = _ask(server, path)
        assert len(data) > 100
        return status

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(get, paths)) == [200] * 200
    assert server.site.readers.open <= 8
    assert process.num_fds() - before < 30  # what was opened is closed, but for a few readers


def test_more_connections_than_threads_wait_and_are_answered(server: ViewServer) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(CONNECTIONS)]
        late = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        late.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        late.settimeout(0.5)
        with pytest.raises(TimeoutError):
            late.recv(10)
        for sock in idle[:3]:
            sock.close()
        late.settimeout(20)
        assert late.recv(12) == b"HTTP/1.1 404"


def test_the_page_names_nothing_outside(server: ViewServer) -> None:
    """No address of another server in what we wrote, and no style or script that is not a file."""
    ours = {name: data.decode() for name, data in _files().items() if name != "openseadragon.min.js"}
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= ours.keys()
    for name, text in ours.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert "eval(" not in text
        assert "innerHTML" not in text
    assert not re.search(r"<style|<script(?! src=)| style=| on\w+=", ours["index.html"])


def test_what_is_vendored_is_what_the_readme_says() -> None:
    readme = Path(pipeline.view.__path__[0]) / "README.md"
    data = _files()["openseadragon.min.js"]
    assert hashlib.sha256(data).hexdigest() in readme.read_text()
    assert b"openseadragon 6.1.1" in data[:40]
    assert (readme.parent / "static" / "openseadragon" / "LICENSE.txt").read_text().startswith("Copyright")
