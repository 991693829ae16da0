"""Joining a Ray cluster or starting a local one, and asking it for what a stage needs before the stage starts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import ray

from pipeline.config.recipe import ClusterConfig
from pipeline.errors import PipelineError, ResourceError

_POLL_S = 1.0
_DUST = 1e-9  # CPUs: 0.1 goes three times into 0.3
_LOCAL_OBJECT_STORE = 256 * 2**20  # bytes; only references and status rows travel through it


Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, for the duration: the address given, else RAY_ADDRESS (a Ray job sets it), else a local cluster.

    A session that is up already is used and left up.
    """
    if ray.is_initialized():
        yield
        return
    prepare_environment()
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_LOCAL_OBJECT_STORE,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise ResourceError(f"cluster.address: no Ray cluster answers at {address} ({error})") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray replaces it by one that aborts with a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def prepare_environment() -> None:
    """Settings of Ray that must stand in the environment before it starts; the user's own win.

    RAY_AUTH_MODE is always explicit: since Ray 2.59 a local start would otherwise write a token that changes what
    later `ray start` and `ray job submit` on the same machine expect.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Threads that wait for one another sleep. Spinning, OpenMP's default, takes the CPU from the decoders and whatever
    # else runs: on two busy cores an epoch of the loop took 4.6 s instead of 18 to 36 s, and a quarter of the CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # the stages log their own progress
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@dataclass(frozen=True)
class Bundle:
    """What one process needs, all of it on one node."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def require(bundles: Sequence[Bundle], timeout_s: float, what: str) -> None:
    """Wait until the cluster's nodes can hold the bundles; ResourceError (exit 5) when they cannot in time.

    Without this check Ray waits for ever for a GPU that no node has, or for 8 CPUs on nodes of 4. What others use at
    the moment is not looked at: it comes free.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = _nodes()
        placed = _fitting(bundles, nodes)
        if placed == len(bundles):
            return
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{what} needs {_counted(bundles)}, each on one node; the cluster has {_counted(nodes) or 'no node'}: "
                f"room for {placed} of {len(bundles)} (waited {timeout_s:g} s). Lower cluster.workers, "
                "cluster.cpus_per_worker or cluster.gpus_per_worker, add nodes, or raise cluster.start_timeout_s where "
                "nodes autoscale"
            )
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def _nodes() -> list[Bundle]:
    """What each node has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Bundle(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


def _fitting(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> int:
    """How many of the bundles find room, the largest first, each on the first node that holds it."""
    free = [[node.gpus, node.cpus] for node in nodes]
    placed = 0
    for bundle in sorted(bundles, key=lambda b: (b.gpus, b.cpus), reverse=True):
        room = next((r for r in free if r[0] + _DUST >= bundle.gpus and r[1] + _DUST >= bundle.cpus), None)
        if room is not None:
            room[0], room[1], placed = room[0] - bundle.gpus, room[1] - bundle.cpus, placed + 1
    return placed


def _counted(bundles: Sequence[Bundle]) -> str:
    counts = Counter(map(str, bundles))
    return ", ".join(f"{count} x ({bundle})" for bundle, count in counts.items())


def call(
    function: Callable[[*Arguments], Result],
    arguments: tuple[*Arguments],
    *,
    cpus: float,
    gpus: float,
    timeout_s: float,
) -> Result:
    """Run a function as one Ray task and return its result; an error of ours comes back as itself."""
    require([Bundle(cpus, gpus)], timeout_s, function.__name__)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_with_threads)
    try:
        result: Result = ray.get(task.remote(function, arguments, max(1, int(cpus))))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from error
        raise
    return result


def _with_threads(function: Callable[[*Arguments], Result], arguments: tuple[*Arguments], threads: int) -> Result:
    """Ray gives a task one BLAS thread unless told otherwise."""
    import torch

    torch.set_num_threads(threads)
    return function(*arguments)
