"""Joining a Ray cluster or starting a local one, and asking it for what a stage needs before the stage starts."""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from pipeline import telemetry
from pipeline.config.recipe import ClusterConfig, Config
from pipeline.errors import PipelineError, ResourceError, StageError

_POLL_S = 1.0
_SHORT = "running low on memory"  # in whatever Ray raises when its memory monitor ended a process
_USED = re.compile(r"[\d.]+GB used / [\d.]+GB limit")
_FORMS = "auto, HOST:6379 or ray://HOST:10001"
_ELSEWHERE = (
    f"start it, correct the address ({_FORMS}), or unset RAY_ADDRESS and set cluster.address=null for a Ray on this "
    "machine alone"
)
_DUST = 1e-9  # CPUs: 0.1 goes three times into 0.3
_LOCAL_OBJECT_STORE = 256 * 2**20  # bytes; only references and status rows travel through it


log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, for the duration: the address given, else RAY_ADDRESS (a Ray job sets it), else a local cluster.

    A session that is up already is used and left up.

    Raises:
        ResourceError: there is none within `cluster.connect_timeout_s`.
    """
    if ray.is_initialized():
        yield
        return
    prepare_environment()
    over, handler = threading.Event(), signal.getsignal(signal.SIGTERM)
    address, named = _address(cluster)
    if address == "local":
        _start(over, cluster.connect_timeout_s)
    else:
        _check(address, named, cluster.connect_timeout_s)
        failure = _attempt(over, cluster.connect_timeout_s, address=address)
        if failure is not None:
            longer = f"or raise cluster.connect_timeout_s={cluster.connect_timeout_s:g}"
            raise ResourceError(f"{named}: {_first_line(failure)}; {_ELSEWHERE}; {longer}") from failure
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's core has replaced it by one that aborts with a stack trace
    try:
        yield
    finally:
        ray.shutdown()
        over.set()


def is_here(cluster: ClusterConfig) -> bool:
    """Whether `connected` would start a Ray on this machine."""
    return not ray.is_initialized() and _address(cluster)[0] == "local"


def _address(cluster: ClusterConfig) -> tuple[str, str]:
    """Of the Ray that `connected` takes, and what names it."""
    given, found = cluster.address, os.environ.get("RAY_ADDRESS")
    if found and given in (None, "auto"):
        return found, f"RAY_ADDRESS={found}"
    return given or "local", f"cluster.address={given}"


def _start(over: threading.Event, seconds: float) -> None:
    """A Ray on this machine. Ray gives up after 30 s of its own, so on a busy machine it is begun anew."""
    deadline = time.monotonic() + seconds
    while True:
        here = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE}
        failure = _attempt(over, deadline - time.monotonic(), address="local", **here)
        if failure is None:
            return
        if "AF_UNIX" in str(failure):
            name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
            raise ResourceError(
                f"{name}={os.environ.get(name)} is too long a path: Ray's sockets lie below it, and may have paths of "
                "107 bytes; set RAY_TMPDIR=/tmp, or another short folder on this machine's disk"
            ) from failure
        if "timed out" not in str(failure).lower() or time.monotonic() >= deadline:
            raise ResourceError(
                f"Ray could not be started on this machine: {_first_line(failure)}; where it is busy, raise "
                f"cluster.connect_timeout_s={seconds:g}; Ray's own logs are below {_sessions()}"
            ) from failure
        log.warning("Ray's start takes long: %s; it is tried again", _first_line(failure))


def _check(address: str, named: str, seconds: float) -> None:
    """Refuse an address where no Ray can be, before Ray asks there for a quarter of an hour."""
    if address == "auto":
        return  # Ray looks for one on this machine
    scheme, _, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ResourceError(
            f"{named} is where Ray's dashboard answers, as `ray job submit` needs it; unset it here, or submit this "
            f"command as a job; or name the cluster as {_FORMS}"
        )
    host, _, port = (rest if ":" in rest or not scheme else f"{rest}:10001").rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise ResourceError(f"{named} is no address of a Ray cluster; write {_FORMS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"{named}: no Ray cluster answers there ({error}); {_ELSEWHERE}") from error


def _attempt(over: threading.Event, seconds: float, **arguments: Any) -> BaseException | None:
    """Let Ray connect, in a thread that is left behind when the time is over; why it could not.

    The thread waits until Ray is `over`: the kernel ends what a thread started together with it (PR_SET_PDEATHSIG,
    which Ray sets), and a local Ray's processes are to live.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False, **arguments)
        except BaseException as error:
            outcome.put(error)
        else:
            outcome.put(None)
            over.wait()

    # It warns that it sets no Python handler of SIGTERM here; ours is to stay.
    hush = logging.getLogger("ray._private.worker")
    hush.addFilter(_is_not_of_sigterm)
    threading.Thread(target=connect, name="ray-init", daemon=True).start()
    try:
        return outcome.get(timeout=max(0.0, seconds))
    except queue.Empty:
        return TimeoutError(f"timed out: Ray has not answered in {seconds:.3g} s")
    finally:
        hush.removeFilter(_is_not_of_sigterm)


def _is_not_of_sigterm(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("SIGTERM handler is not set")


def _first_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


def _sessions() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


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


def abreast(bundles: Sequence[Bundle], most: int) -> int:
    """How many times the cluster's nodes hold all of the bundles side by side, up to `most`; 0 for not even once."""
    nodes = _nodes()
    held = (count for count in range(most, 0, -1) if _fitting([*bundles] * count, nodes) == count * len(bundles))
    return next(held, 0)


def of_training(config: Config, workers: int) -> list[Bundle]:
    """What a training with so many workers takes: they, and what tiles for them where patches are streamed."""
    cluster = config.cluster
    readers = cluster.readers_per_worker if config.train.source == "stream" else 0
    return [Bundle(cluster.cpus_per_worker, cluster.gpus_per_worker), *[Bundle(config.tiling.cpus)] * readers] * workers


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
    advice: str,
) -> Result:
    """Run a function as one Ray task and return its result; an error of ours comes back as itself.

    Raises:
        StageError: its process was ended twice; with the `advice` for where memory is short.
    """
    require([Bundle(cpus, gpus)], timeout_s, function.__name__)
    # Of a task that its memory monitor ended, Ray's own retries have no end.
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_with_threads)
    for last in (False, True):
        try:
            found: tuple[Result, dict[str, float]] = ray.get(task.remote(function, arguments, max(1, int(cpus))))
        except RayTaskError as error:
            if isinstance(error.cause, PipelineError):
                raise error.cause from error
            raise
        except RayError as error:
            said = ended(error)
            if said is None:
                raise
            if last:
                raise StageError(f"{function.__name__}: {said}, twice; {advice}, and run again") from error
            log.warning("%s: %s; it is tried once more", function.__name__, said)
        else:
            break
    result, sums = found
    telemetry.add(sums)
    return result


def ended(error: Exception) -> str | None:
    """Why a process of ours ended, in a line of Ray's error about it; None where the error is of another kind.

    Where the kernel ends one for want of memory nobody is told, so what is killed unsaid is told as that, too.
    """
    text = str(error)
    if isinstance(error, OutOfMemoryError) or _SHORT in text:
        found = _USED.search(text)
        return "Ray ended its process, for its node ran out of memory" + (f" ({found[0]})" if found else "")
    if isinstance(error, NodeDiedError) or "node has died" in text:
        return "its node was lost"
    if isinstance(error, WorkerCrashedError) or "worker process has died" in text:
        return "its process was killed, as the kernel does where memory runs out, or crashed"
    return text.strip().rpartition("\n")[2] if isinstance(error, RayActorError) else None


def release(actor_id: str) -> None:
    """Give back what an actor that died had reserved for others.

    Ray itself does when the whole job ends; Ray Train's own cleaner asks the dashboard whether the actor lives, and
    where there is none it asks for ever.
    """
    try:
        ray.get(ray.remote(num_cpus=0)(_remove_groups).remote(actor_id))
    except RayError as error:
        log.warning("what a lost process had reserved could not be given back: %s", _first_line(error))


def _remove_groups(actor_id: str) -> None:
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        if group.creator_actor_id.hex() == actor_id and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _with_threads(
    function: Callable[[*Arguments], Result], arguments: tuple[*Arguments], threads: int
) -> tuple[Result, dict[str, float]]:
    """What the function gives, and where its time went; Ray gives a task one BLAS thread unless told otherwise."""
    import torch

    torch.set_num_threads(threads)
    return function(*arguments), telemetry.drain()
