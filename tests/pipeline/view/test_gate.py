from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.view.gate import TOKEN, Gate, gate, is_loopback

SECRET = "a token of the tests"


@pytest.mark.parametrize("header", ["localhost", "127.0.0.1:8765", "LOCALHOST:9", "[::1]:80", "127.0.0.1"])
def test_this_machine_is_known_by_its_names_at_any_port(header: str) -> None:
    assert gate("127.0.0.1", None).knows(header)


@pytest.mark.parametrize(
    "header",
    [None, "", "evil.example", "evil.example:8765", "10.0.0.5:8765", "localhost.evil.example", "127.0.0.1@evil.example",
     "localhost/", "localhost:x", "localhost:99999", "[::1", "a b", "localhost#", "127.1", "0x7f000001"],
)  # fmt: skip
def test_other_names_are_not(header: str | None) -> None:
    assert not gate("127.0.0.1", None).knows(header)


def test_on_a_network_addresses_and_the_machines_name_are_known_and_no_others() -> None:
    guard = gate("0.0.0.0", SECRET)
    for header in ("192.168.4.7:8765", "[fe80::1]:8765", socket.gethostname(), "localhost:1"):
        assert guard.knows(header)
    assert not guard.knows("evil.example")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "127.0.0.1", "192.168.4.7", "localhost"])
def test_the_name_that_is_told_is_one_that_it_is_known_by_and_never_every_address(host: str) -> None:
    guard = gate(host, SECRET)
    assert guard.knows(f"{guard.name}:8765")
    assert guard.name == (host if host not in ("0.0.0.0", "::", "") else socket.gethostname().lower())


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_header_raises(header: str) -> None:
    gate("127.0.0.1", None).knows(header)
    gate("0.0.0.0", SECRET).admits(header, 8765)
    gate("0.0.0.0", SECRET).opens(header)


def test_loopback_needs_no_token_and_a_network_draws_one() -> None:
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert gate("127.0.0.1", None).token is None
    drawn = gate("0.0.0.0", None).token
    assert drawn is not None
    assert len(drawn) >= 40
    assert drawn != gate("0.0.0.0", None).token
    assert gate("127.0.0.1", SECRET).token == SECRET


def test_the_token_opens_and_the_session_admits() -> None:
    guard = gate("0.0.0.0", SECRET)
    assert guard.opens(SECRET)
    assert not guard.opens(SECRET[:-1])
    assert not guard.opens("")
    assert guard.admits(f"other=1; {guard.cookie(7)}={guard.session}", 7)
    for wrong in (None, "", f"{guard.cookie(8)}={guard.session}", f"{guard.cookie(7)}={SECRET}", f"{guard.cookie(7)}="):
        assert not guard.admits(wrong, 7)
    assert SECRET not in guard.session
    assert Gate("127.0.0.1", None).admits(None, 7)
    assert not Gate("127.0.0.1", None).opens("")


@pytest.mark.parametrize("token", ["short", "é" * 20, "x" * 20 + "\n"])
def test_a_token_that_is_none_is_refused_by_its_variable(token: str) -> None:
    with pytest.raises(ConfigError, match=TOKEN) as caught:
        gate("0.0.0.0", token)
    assert token not in str(caught.value)
