"""Fixtures of the pipeline's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server, serve_s3


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite store that the session's tests share, each under its own experiment: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for a file's tests, with an empty bucket `slides`."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("slides")
        yield server
