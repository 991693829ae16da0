"""Who may ask: requests by this server's own names, and on a network by whoever holds the token.

A page of somebody else's can make a browser ask this server, too. It cannot read answers (no CORS), cannot embed them
(`Cross-Origin-Resource-Policy`), and a name of its own that leads here (DNS rebinding) is refused by the Host header.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from pipeline.errors import ConfigError

TOKEN = "IPS_VIEW_TOKEN"
"""Variable that gives the token."""
LEAST_TOKEN = 16  # characters
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Gate:
    """What is asked of a request, before it is looked at."""

    host: str
    """Address or name that the server listens at."""
    token: str | None
    """None: whoever reaches the server may look."""
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """What a browser shows after it has shown the token once: the token itself is not kept there."""

    @property
    def name(self) -> str:
        """By which a browser asks: what it listens at, but where that is every address, which is nobody's name."""
        return socket.gethostname().lower() if _is_every(self.host) else self.host

    def knows(self, header: str | None) -> bool:
        """Whether a Host header names this server, at whatever port a tunnel has.

        A literal address cannot be another's name, so beyond loopback any is taken.
        """
        if header is None or not (name := _name(header)):
            return False
        if name in _LOCAL or name == self.host.lower():
            return True
        if is_loopback(self.host):
            return False
        return _is_address(name) or name in {socket.gethostname().lower(), socket.getfqdn().lower()}

    def admits(self, cookies: str | None, port: int) -> bool:
        """Whether a request may see anything, by its Cookie header."""
        if self.token is None:
            return True
        try:
            found = SimpleCookie(cookies or "").get(self.cookie(port))
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.session.encode())

    def opens(self, shown: str) -> bool:
        """Whether what was shown is the token; takes the same time wherever the two differ."""
        return self.token is not None and hmac.compare_digest(shown.encode(errors="replace"), self.token.encode())

    @staticmethod
    def cookie(port: int) -> str:
        """Name of the cookie; browsers do not tell the ports of a host apart."""
        return f"ips-view-{port}"


def gate(host: str, token: str | None) -> Gate:
    """The gate of a server at `host`: beyond loopback with a token, drawn where none is given.

    Raises:
        ConfigError: the token is too short to be one.
    """
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(TOKEN, [f"it is no token: give {LEAST_TOKEN} ASCII characters or more, or leave it unset"])
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(32)
    return Gate(host, token)


def _name(header: str) -> str:
    """The host of a Host header in small letters, without port and brackets; "" where it is none."""
    try:
        parts = urlsplit(f"//{header}")
        plain = parts.port is None or parts.port > 0  # raises where it is no number
    except ValueError:
        return ""
    plain = plain and parts.netloc == header and "@" not in header and not parts.path
    return (parts.hostname or "") if plain else ""


def _is_every(host: str) -> bool:
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
