"""The HTTP of it: GET and HEAD, bounded connections, the same careful headers on every answer.

The standard library's server: a thread a connection is right for one person's browser and its six, it needs nothing to
be installed, and what can be asked for is little enough to be read here. aiohttp, which Ray brings, would hand every
tile to a thread as well, since decoding one blocks.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import sys
import threading
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, ClassVar
from urllib.parse import parse_qs

from pipeline.errors import PipelineError
from pipeline.view.gate import Gate
from pipeline.view.routes import Route, parse
from pipeline.view.site import Site

log = logging.getLogger(__name__)

CONNECTIONS = 256  # threads; further ones wait to be accepted
IDLE_S = 20.0  # without a byte: a browser opens its connections again
_LASTING = "private, max-age=86400, immutable"  # of one start of the server: the tag stands in the address
_MEDIA = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = "".join(
    f"{name}: {value}\r\n"
    for name, value in {
        "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
    }.items()
)


@dataclass(frozen=True)
class _Answer:
    status: int
    data: bytes
    media: str = "text/plain; charset=utf-8"
    caching: str = "no-store"
    more: str = ""
    """Further header lines."""


class ViewServer(ThreadingHTTPServer):
    """Listens as soon as it is made; `port` is the one it got."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, site: Site, gate: Gate, port: int) -> None:
        """OSError where the address or port cannot be had."""
        self.site, self.gate = site, gate
        self._slots = threading.Semaphore(CONNECTIONS)
        self._ending = False
        self.address_family = socket.AF_INET6 if ":" in gate.host else socket.AF_INET
        super().__init__((gate.host, port), _Handler)
        self.port: int = self.server_address[1]

    def server_bind(self) -> None:
        """Without asking the name service for this machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def shutdown(self) -> None:
        """Accept no more, and return when that holds."""
        self._ending = True
        super().shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, once one of the `CONNECTIONS` is free."""
        while not self._slots.acquire(timeout=0.2):
            if self._ending:
                self.shutdown_request(request)
                return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer until the connection ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is nobody's fault."""
        del request, client_address
        if not isinstance(sys.exception(), OSError):
            log.exception("view: a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = IDLE_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._send(self._answer())

    def do_HEAD(self) -> None:
        self._send(self._answer())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses, in the same form as all answers."""
        del explain
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only"
        self.close_connection = True
        more = "Allow: GET, HEAD\r\n" if code == HTTPStatus.METHOD_NOT_ALLOWED else ""
        self._send(_text(code, message or HTTPStatus(code).phrase, more))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: tiles are many, and what is looked at is nobody's business."""

    def _answer(self) -> _Answer:
        gate, names = self.server.gate, self.headers.get_all("Host") or []
        if len(names) != 1 or not gate.knows(names[0]):
            return _text(HTTPStatus.MISDIRECTED_REQUEST, "this server does not go by that name")
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what follows is no request
            return _text(HTTPStatus.BAD_REQUEST, "questions have no body")
        path, _, query = self.path.partition("?")
        if path == "/" and (shown := _token(query)) and gate.opens(shown):
            cookie = f"{gate.cookie(self.server.port)}={gate.session}; Path=/; HttpOnly; SameSite=Strict"
            return _text(HTTPStatus.SEE_OTHER, "", f"Location: /\r\nSet-Cookie: {cookie}\r\n")
        if not gate.admits(self.headers.get("Cookie"), self.server.port):
            return _text(HTTPStatus.UNAUTHORIZED, "open the address that the command printed: it has the token")
        route = parse(self.path)
        return _text(HTTPStatus.NOT_FOUND, "no such thing here") if route is None else self._found(route)

    def _found(self, route: Route) -> _Answer:
        site = self.server.site
        if route.kind in ("page", "static"):
            return self._page("index.html" if route.kind == "page" else route.name)
        if route.kind == "slides":
            return _Answer(HTTPStatus.OK, site.listed(), "application/json")
        if route.tag != site.tag:
            return _text(HTTPStatus.GONE, "the server was started anew; load the page again")
        try:
            if route.kind == "slide":
                return _Answer(HTTPStatus.OK, site.detailed(route.numbers[0]), "application/json")
            picture = site.picture(route)
        except IndexError as error:
            return _text(HTTPStatus.NOT_FOUND, str(error))
        except PipelineError as error:
            log.warning("view: %s", error)
            return _text(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        return _Answer(HTTPStatus.OK, picture.data, picture.media, _LASTING if picture.lasting else "no-store")

    def _page(self, name: str) -> _Answer:
        if (data := _files().get(name)) is None:
            return _text(HTTPStatus.NOT_FOUND, "no such file here")
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        more = f"ETag: {tag}\r\n"
        if self.headers.get("If-None-Match") == tag:
            return _Answer(HTTPStatus.NOT_MODIFIED, b"", caching="no-cache", more=more)
        return _Answer(HTTPStatus.OK, data, _MEDIA[name.rpartition(".")[2]], "no-cache", more)

    def _send(self, answer: _Answer) -> None:
        """Head and body in one piece, so that neither waits for the other's acknowledgement."""
        head = (
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
            f"Content-Type: {answer.media}\r\nContent-Length: {len(answer.data)}\r\n"
            f"Cache-Control: {answer.caching}\r\n{_HEADERS}{answer.more}"
            f"Connection: {'close' if self.close_connection else 'keep-alive'}\r\n\r\n"
        )
        self.wfile.write(head.encode("latin-1") + (b"" if self.command == "HEAD" else answer.data))


def _text(status: int, words: str, more: str = "") -> _Answer:
    return _Answer(status, words.encode(errors="replace"), more=more)


def _token(query: str) -> str | None:
    try:
        return parse_qs(query, max_num_fields=4).get("token", [None])[0]
    except ValueError:
        return None


@cache
def _files() -> dict[str, bytes]:
    """The page's files by their name, wherever below `static` they lie."""
    found = resources.files("pipeline.view") / "static"
    both = [*found.iterdir(), *(found / "openseadragon").iterdir()]
    return {one.name: one.read_bytes() for one in both if one.is_file() and one.name.rpartition(".")[2] in _MEDIA}
