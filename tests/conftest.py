"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.pop("RAY_ADDRESS", None)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_slides() -> Path:
    """Folder of real slides; it never is part of the repo."""
    folder = SHARED_DATA / "slides"
    if not folder.is_dir():
        pytest.skip(f"real slides are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_overviews() -> Path:
    """Folder of real slides in small, some with pen; it never is part of the repo."""
    folder = SHARED_DATA / "tissue"
    if not folder.is_dir():
        pytest.skip(f"overviews of real slides are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_mnist() -> Path:
    """Folder of the MNIST idx files; it never is part of the repo."""
    folder = SHARED_DATA / "mnist"
    if not folder.is_dir():
        pytest.skip(f"MNIST is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray of two CPUs for all tests that need one: starting it takes seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
