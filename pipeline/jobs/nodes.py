"""What every node of a cluster has, asked of each one, and held against the others and the config."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster import connected
from pipeline.config.recipe import Config
from pipeline.errors import PipelineError
from pipeline.storage.files import delete, join, read_bytes, write_bytes
from pipeline.tracking.tracker import connect

_PACKAGES = ("ips-pipeline", "torch", "ray", "mlflow", "pyarrow", "openslide-bin", "imagecodecs", "simplejpeg", "numpy")
_MIN_SHARED, _MIN_DISK = 2**30, 10**10  # bytes: Ray's object store; copies of slides, and what Ray spills
_MIN_FILES = 4096  # Ray asks for as many at least
_MAX_SKEW_S = 5.0  # S3 refuses requests that are 15 minutes off; log lines of nodes should still be in order
_ANSWER_S = 120.0  # a node's first task starts a process and loads torch


@dataclass(frozen=True)
class Answer:
    """What a node says of itself."""

    host: str
    versions: Mapping[str, str]
    storage: str | None
    """Why the root cannot be read and written there; None where it can."""
    tracking: str | None
    """The same of MLflow."""
    gpus: int
    """That torch sees."""
    shared: int
    """Bytes of /dev/shm."""
    disk: int
    """Bytes free where Ray keeps its files."""
    files: int
    """That a process may have open."""
    clock: float
    """Seconds since 1970, there."""


@dataclass(frozen=True)
class Finding:
    """One check of one node."""

    node: str
    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine_nodes(config: Config) -> list[Finding]:
    """All checks of all nodes; each one writes and deletes a file in storage.root.

    Raises:
        ResourceError: there is no such cluster.
    """
    with connected(config.cluster):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = [(node, time.time(), _ask(node["NodeID"], config)) for node in nodes]
        return judged([(_named(node), _answer(node, began, task)) for node, began, task in asked])


def _named(node: Mapping[str, Any]) -> str:
    return str(node["NodeManagerAddress"])


def _ask(node_id: str, config: Config) -> Any:
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    uri = config.tracking.uri
    return ray.remote(num_cpus=0, scheduling_strategy=here)(probe).remote(config.storage.root, uri)


def _answer(node: Mapping[str, Any], began: float, task: Any) -> tuple[Answer, float, float] | str:
    """A node's answer with the clock difference and GPUs that Ray counts there, or why there is none."""
    try:
        answer: Answer = ray.get(task, timeout=_ANSWER_S)
    except GetTimeoutError:
        return f"it has not answered in {_ANSWER_S:.0f} s"
    except RayError as error:
        return str(error).strip().splitlines()[-1]
    # It looked at its clock between our question and now.
    early, late = answer.clock - began, answer.clock - time.time()
    skew = 0.0 if early >= 0 >= late else min(abs(early), abs(late))
    return answer, skew, float(node["Resources"].get("GPU", 0.0))


def probe(root: str, tracking_uri: str | None) -> Answer:
    """What a node says of itself; runs there."""
    import torch

    return Answer(
        host=socket.gethostname(),
        versions={"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        storage=_storage(root),
        tracking=_tracking(tracking_uri),
        gpus=torch.cuda.device_count(),
        shared=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0,
        disk=shutil.disk_usage(os.environ.get("RAY_TMPDIR", "/tmp")).free,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock=time.time(),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _storage(root: str) -> str | None:
    place = join(root, f".doctor-{uuid.uuid4().hex}")
    try:
        write_bytes(place, b"ok")
        read_bytes(place)
        delete(place)
    except PipelineError as error:
        return str(error).splitlines()[0]
    return None


def _tracking(uri: str | None) -> str | None:
    if uri is None or not uri.startswith("http"):
        return None  # a database's file is the driver's alone
    try:
        connect(uri)
    except PipelineError as error:
        return str(error).splitlines()[0]
    return None


def judged(answers: Sequence[tuple[str, tuple[Answer, float, float] | str]]) -> list[Finding]:
    """The checks of all nodes; versions are held against what most of them have."""
    usual: dict[str, str] = {}
    whole = [answer[0] for _, answer in answers if not isinstance(answer, str)]
    for package in whole[0].versions if whole else ():
        usual[package] = Counter(answer.versions[package] for answer in whole).most_common(1)[0][0]
    findings: list[Finding] = []
    for node, answer in answers:
        if isinstance(answer, str):
            remedy = "see that the node runs the same image, with this package, and look into its Ray's logs"
            findings.append(Finding(node, "answer", ok=False, found=answer, remedy=remedy))
        else:
            findings += _judged(node, *answer, usual)
    return findings


def _judged(node: str, answer: Answer, skew: float, gpus: float, usual: Mapping[str, str]) -> list[Finding]:
    other = [f"{name} {has} (others {usual[name]})" for name, has in answer.versions.items() if has != usual[name]]

    def finding(name: str, found: str, remedy: str, *, ok: bool) -> Finding:
        return Finding(node, name, ok, found, "" if ok else remedy)

    core = ", ".join(f"{name} {answer.versions[name]}" for name in ("python", "torch", "ray", "ips-pipeline"))
    return [
        finding("versions", "; ".join(other) or core, "run one image on all nodes", ok=not other),
        finding(
            "storage",
            answer.storage or "read and written",
            "mend as said; local folders must be the same disk on all nodes, credentials in every node's environment",
            ok=answer.storage is None,
        ),
        finding("mlflow", answer.tracking or "reachable", "mend as said, on this node", ok=answer.tracking is None),
        finding(
            "gpus",
            f"{answer.gpus} seen, {gpus:g} offered by Ray",
            "start Ray there with --num-gpus as many as the driver shows (nvidia-smi), in an image with CUDA",
            ok=answer.gpus >= gpus or gpus == 0,
        ),
        finding(
            "shm",
            f"{answer.shared / 2**30:.1f} GiB of /dev/shm",
            "mount an emptyDir of medium Memory at /dev/shm, or docker run --shm-size=2g",
            ok=answer.shared >= _MIN_SHARED,
        ),
        finding(
            "disk",
            f"{answer.disk / 1e9:.0f} GB free",
            f"free {_MIN_DISK / 1e9:g} GB: copies of slides (tiling.cache) and what Ray spills lie there",
            ok=answer.disk >= _MIN_DISK,
        ),
        finding("clock", f"{skew:.1f} s off", "let the node keep time by NTP", ok=skew <= _MAX_SKEW_S),
        finding(
            "files", f"{answer.files} open files", "ulimit -n 65536 before ray start", ok=answer.files >= _MIN_FILES
        ),
    ]
