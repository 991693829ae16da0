"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.pop("RAY_ADDRESS", None)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each has its share of the cores: two pools of two threads on two cores wait for each other by spinning, and a test
    # that takes 0.6 s alone then took 19 s.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _shared(name: str, what: str) -> Path:
    """A folder beside the checkout, never part of the repo; a test that needs it is skipped where it is not there."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{what} are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_slides() -> Path:
    """Folder of real slides."""
    return _shared("slides", "real slides")


@pytest.fixture(scope="session")
def shared_overviews() -> Path:
    """Folder of real slides in small, some with pen."""
    return _shared("tissue", "overviews of real slides")


@pytest.fixture(scope="session")
def shared_crds() -> Path:
    """Folder of KubeRay's schemas."""
    return _shared("crds", "KubeRay's schemas")


@pytest.fixture(scope="session")
def shared_mnist() -> Path:
    """Folder of the MNIST idx files."""
    return _shared("mnist", "MNIST's files")


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
