from __future__ import annotations

import os

import pytest

from pipeline.cluster import call, connected, prepare_environment, require
from pipeline.config import ClusterConfig
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
    require(2, 0, 0.1, "train")
    with pytest.raises(ResourceError, match=r"train needs 2 CPUs and 1 GPUs; the cluster has 2 and 0") as caught:
        require(2, 1, 0.1, "train")
    assert caught.value.exit_code == 5


@pytest.mark.ray
def test_a_session_that_is_up_is_used_and_left_up(ray_session: None) -> None:
    import ray

    with connected(ClusterConfig(address="ray://127.0.0.1:1")):
        pass
    assert ray.is_initialized()


def test_the_user_s_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
