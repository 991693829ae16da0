from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from pipeline.cluster import Bundle, abreast, call, connected, is_here, of_training, prepare_environment, require
from pipeline.config.recipe import ClusterConfig
from pipeline.errors import ResourceError, SlideError, StageError
from tests.pipeline.small import small_config


def _double(number: int) -> int:
    return 2 * number


def _fail(name: str) -> None:
    raise SlideError("no-tissue", f"{name}: nothing on it")


@pytest.mark.ray
def test_a_call_returns_its_result_or_its_own_error(ray_session: None) -> None:
    assert call(_double, (21,), cpus=1, gpus=0, timeout_s=5, advice="") == 42
    with pytest.raises(SlideError, match=r"^a.svs: nothing on it$") as caught:
        call(_fail, ("a.svs",), cpus=1, gpus=0, timeout_s=5, advice="")
    assert caught.value.reason == "no-tissue"


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_call_whose_process_is_killed_says_memory_and_what_to_lower(ray_session: None) -> None:
    with pytest.raises(StageError, match=r"^_die: its process was killed, .* memory runs out.*, twice; lower x=3, and"):
        call(_die, (), cpus=1, gpus=0, timeout_s=5, advice="lower x=3")


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


@pytest.mark.parametrize(
    ("bundles", "most", "held"),
    [
        ([Bundle(2)], 9, 4),
        ([Bundle(2)], 3, 3),
        ([Bundle(3), Bundle(1)], 9, 2),
        ([Bundle(3)] * 2, 9, 1),  # one of 3 CPUs a node
        ([Bundle(1, 1)], 9, 1),
        ([Bundle(8)], 9, 0),
    ],
)
def test_what_fits_side_by_side_is_counted(
    monkeypatch: pytest.MonkeyPatch, bundles: list[Bundle], most: int, held: int
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    assert abreast(bundles, most) == held


def test_a_training_takes_its_workers_and_what_tiles_for_them() -> None:
    stored = small_config(cluster={"cpus_per_worker": 3, "gpus_per_worker": 1})
    assert of_training(stored, 2) == [Bundle(3, 1)] * 2
    streamed = small_config(cluster={"readers_per_worker": 2}, train={"source": "stream"}, tiling={"cpus": 0.5})
    assert of_training(streamed, 2) == [Bundle(2), Bundle(0.5), Bundle(0.5)] * 2


@pytest.mark.ray
def test_a_session_that_is_up_is_used_and_left_up(ray_session: None) -> None:
    import ray

    with connected(ClusterConfig(address="ray://127.0.0.1:1")):
        pass
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("given", "found", "where"),
    [
        (None, None, "here"), ("local", None, "here"), ("local", "10.0.0.1:6379", "here"), (None, "local", "here"),
        (None, "10.0.0.1:6379", "there"), ("auto", None, "there"), ("auto", "local", "here"),
        ("auto", "10.0.0.1:6379", "there"), ("ray://head:10001", None, "there"),
    ],
)  # fmt: skip
def test_whether_ray_would_run_here(
    given: str | None, found: str | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if found is not None:
        monkeypatch.setenv("RAY_ADDRESS", found)
    assert is_here(ClusterConfig(address=given)) == (where == "here")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert not is_here(ClusterConfig(address=given))


def test_the_user_s_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "http://127.0.0.1:8265",
            r"^RAY_ADDRESS=http://127.0.0.1:8265 is where .*submit.* unset it here",
        ),
        ("head", r"^RAY_ADDRESS=head is no address of a Ray cluster; write auto, HOST:6379 or ray://HOST:10001"),
        ("grpc://head:1", "is no address of a Ray cluster"),
        ("head:x", "is no address of a Ray cluster"),
        ("{gone}", r"^RAY_ADDRESS=\S+ no Ray cluster answers there \(.*refused\); .* unset RAY_ADDRESS and"),
        ("ray://{gone}", r"^RAY_ADDRESS=ray://\S+ no Ray cluster answers there \(.*refused\)"),
        ("head.invalid:6379", r"^RAY_ADDRESS=\S+ no Ray cluster answers there \("),
    ],
)
@pytest.mark.parametrize("given", [None, "auto"])
def test_an_address_where_no_ray_can_be_is_refused_at_once(
    given: str | None, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:  # nobody answers there
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.format(gone=f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(ResourceError, match=words) as caught, connected(ClusterConfig(address=given)):
            pass
    assert caught.value.exit_code == 5


RUN = """
import ray, typer
from pipeline.cli.console import errors
from pipeline.cluster import connected
from pipeline.config.recipe import ClusterConfig
def main(seconds: float) -> None:
    with errors(as_json=False), connected(ClusterConfig(connect_timeout_s=seconds)):
        print(ray.get(ray.remote(lambda: 41).remote()) + 1)
typer.run(main)
"""


SHORT = """
import os, time, typer
os.environ.update(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
from pipeline.cli.console import errors
from pipeline.cluster import call, connected
from pipeline.config.recipe import ClusterConfig
def slow() -> None:
    time.sleep(600)
def main() -> None:
    with errors(as_json=False), connected(ClusterConfig()):
        call(slow, (), cpus=1, gpus=0, timeout_s=30, advice="lower x=3")
typer.run(main)
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_call_that_ray_ends_for_want_of_memory_says_how_much_there_was() -> None:
    """Ray's own retries would never end."""
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: slow: Ray ended its process, for its node ran out of memory \([\d.]+GB used / [\d.]+GB limit\), "
        "twice; lower x=3, and run again",
        last,
    ), done.stderr


def _connect(seconds: float, **environment: str) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a process that joins or starts Ray."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(seconds)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stderr + done.stdout, time.monotonic() - began


TERM = """
import os, signal, typer
from pipeline.cli.console import errors
from pipeline.cluster import connected
from pipeline.config.recipe import ClusterConfig
def main() -> None:
    with errors(as_json=False), connected(ClusterConfig(connect_timeout_s=300)):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
typer.run(main)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_signal_is_an_interruption_while_ray_is_up() -> None:
    """Its core would abort with a stack trace."""
    done = subprocess.run([sys.executable, "-c", TERM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (
        143,
        "error: interrupted by SIGTERM; run the same command to go on",
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_long_folder_for_temporary_files_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code, said, _ = _connect(60, TMPDIR=str(folder))
    assert code == 5, said
    assert f"error: TMPDIR={folder} is too long a path" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.ray
def test_who_listens_and_is_no_ray_is_given_up_in_time() -> None:
    """The kernel takes the connection, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        code, said, seconds = _connect(5, RAY_ADDRESS=f"127.0.0.1:{mute.getsockname()[1]}")
    assert code == 5, said
    assert "Ray has not answered in 5 s; start it, correct the address" in said
    assert "or raise cluster.connect_timeout_s=5" in said
    assert "Traceback" not in said
    assert seconds < 40


@pytest.mark.slow
@pytest.mark.ray
def test_a_start_that_takes_too_long_is_given_up_in_time_and_one_in_time_works() -> None:
    code, said, seconds = _connect(0.3)
    assert code == 5, said
    assert "error: Ray could not be started on this machine: TimeoutError" in said
    assert "raise cluster.connect_timeout_s=0.3" in said
    assert "Traceback" not in said
    assert seconds < 40
    code, said, _ = _connect(120)
    assert (code, said.strip()) == (0, "42")
