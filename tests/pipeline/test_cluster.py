from __future__ import annotations

import os

import pytest

from pipeline.cluster import Bundle, call, connected, prepare_environment, require
from pipeline.config.recipe import ClusterConfig
from pipeline.errors import ResourceError, SlideError


def _double(number: int) -> int:
    return 2 * number


def _fail(name: str) -> None:
    raise SlideError("no-tissue", f"{name}: nothing on it")


@pytest.mark.ray
def test_a_call_returns_its_result_or_its_own_error(ray_session: None) -> None:
    assert call(_double, (21,), cpus=1, gpus=0, timeout_s=5) == 42
    with pytest.raises(SlideError, match=r"^a.svs: nothing on it$") as caught:
        call(_fail, ("a.svs",), cpus=1, gpus=0, timeout_s=5)
    assert caught.value.reason == "no-tissue"


@pytest.mark.ray
@pytest.mark.timeout(60)
def test_what_the_cluster_never_has_is_refused_in_time(ray_session: None) -> None:
    require([Bundle(0.5)] * 4, 0.1, "train")
    with pytest.raises(
        ResourceError,
        match=r"train needs 3 x \(1 CPUs and 0 GPUs\), .* the cluster has 1 x \(2 CPUs and 0 GPUs\): room for 2 of 3",
    ) as caught:
        require([Bundle(1)] * 3, 0.1, "train")
    assert caught.value.exit_code == 5


NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("bundles", "message"),
    [
        ([Bundle(8)], r"needs 1 x \(8 CPUs and 0 GPUs\).* has 1 x \(4 CPUs and 1 GPUs\), 1 x \(4 CPUs and 0 GPUs\)"),
        ([Bundle(3), Bundle(3), Bundle(2)], "room for 2 of 3"),
        ([Bundle(1, 1), Bundle(1, 1)], "room for 1 of 2"),
        ([Bundle(4, 0), Bundle(4, 0), Bundle(0.5, 0)], "room for 2 of 3"),
    ],
)
def test_a_worker_has_to_fit_on_one_node(monkeypatch: pytest.MonkeyPatch, bundles: list[Bundle], message: str) -> None:
    """A cluster of several nodes is not started here: what Ray says of one is what is read."""
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    with pytest.raises(ResourceError, match=message):
        require(bundles, 0, "train")


@pytest.mark.parametrize(
    "bundles",
    [[], [Bundle(4), Bundle(4)], [Bundle(3)] * 2 + [Bundle(1, 1)], [Bundle(0.1)] * 80, [Bundle(0.5, 0.25)] * 4],
)
def test_what_fits_is_let_through(monkeypatch: pytest.MonkeyPatch, bundles: list[Bundle]) -> None:
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    require(bundles, 0, "train")


@pytest.mark.ray
def test_a_session_that_is_up_is_used_and_left_up(ray_session: None) -> None:
    import ray

    with connected(ClusterConfig(address="ray://127.0.0.1:1")):
        pass
    assert ray.is_initialized()


def test_the_user_s_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
