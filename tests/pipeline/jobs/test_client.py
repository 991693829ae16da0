from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.jobs import client as module
from pipeline.jobs.client import address_of, connect
from tests.processes import free_port


def test_the_config_s_address_comes_before_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert address_of(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "head:8265")
    assert address_of(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.org")
    assert address_of(None) == "https://ray.example.org"
    assert address_of("http://other:1") == "http://other:1"


@pytest.mark.parametrize("address", ["ray://head:10001", "ftp://x"])
def test_an_address_of_something_else_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(ResourceError, match="no address of a job server; set deploy.address=http://HEAD:8265"):
        connect(address)


def test_nobody_there_and_a_silent_one_end_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(module, "_REQUEST_S", 0.5)
    with pytest.raises(ResourceError, match=r"no job server answers there .* deploy\.address"):
        connect(f"http://127.0.0.1:{free_port()}")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # the system takes connections, nobody answers
        pytest.raises(ResourceError, match="no job server answers there"),
    ):
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
