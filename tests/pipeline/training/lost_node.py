"""Trains a pickled job on a Ray cluster that loses first a worker process, then the node it ran on.

`python -m tests.pipeline.training.lost_node JOB killed|asked`: the job's run comes to its end, or the exit code is
not 0. Killed means by SIGKILL and by the node's disappearance, asked by SIGTERM and by a notice that the node will be
taken away.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster import prepare_environment
from pipeline.model.checkpoint import Progress
from pipeline.training import driver, worker
from pipeline.training.driver import train
from pipeline.training.saver import newest
from pipeline.training.session import Job

_MEMORY = 100 * 2**20  # of an object store
_PACE_S = 0.1  # a step lasts at least, so that the run is under way when a notice comes, which takes up to 5 s
_NOTICE_S = 15


def main(path: str, how: str) -> None:
    job: Job = pickle.loads(Path(path).read_bytes())
    prepare_environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _MEMORY})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    done = threading.Event()
    if how == "asked":
        driver.train_worker = watched_worker  # type: ignore[attr-defined]

    def harm() -> None:
        _wait_for_step(job.folder, 8, done)
        process = _worker()
        process.kill() if how == "killed" else process.terminate()
        print(f"{how} worker {process.pid}", flush=True)
        _wait_for_step(job.folder, 28, done)
        raylet = _worker().ppid()
        (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet]
        if how == "asked":
            _announce(cluster, node.node_id)
            print(f"noticed and saved: {_wait_for_notice(job, done)}", flush=True)
            time.sleep(_NOTICE_S)
        cluster.remove_node(node, allow_graceful=False)
        print("removed its node", flush=True)

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        fingerprint = job.folder.rpartition("-")[2]
        trained = train(job.config, job.train, job.val, fingerprint, job.tracker, job.run_id)
    finally:
        done.set()
        thread.join()
    print(trained.checkpoint)
    ray.shutdown()
    cluster.shutdown()


def watched_worker(loop_config: Mapping[str, Job]) -> Progress:
    """The pipeline's worker, slowed down; it writes after which step it noticed, and which step was then saved."""
    job = loop_config["job"]
    found = newest(job.folder)
    taken, noticed = found.step if found else 0, 0
    asked = worker.Notices.seen

    def seen(self: worker.Notices) -> bool:
        nonlocal taken, noticed
        time.sleep(_PACE_S)
        if noticed and not _notice(job).exists():
            saved = newest(job.folder)
            _notice(job).write_text(f"{noticed} {saved and saved.step}")
        taken += 1
        leaving = asked(self)
        if leaving and not noticed:
            noticed = taken
        return leaving

    worker.Notices.seen = seen  # type: ignore[method-assign]
    return worker.train_worker(loop_config)


def _notice(job: Job) -> Path:
    return Path(job.folder).parent / "notice"


def _announce(cluster: Cluster, node_id: str) -> None:
    """What a cloud's autoscaler does before it takes a node away."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    command += ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(_NOTICE_S)], check=True)


def _worker() -> psutil.Process:
    """The only training worker."""
    children = psutil.Process().children(recursive=True)
    (found,) = [process for process in children if "RayTrainWorker" in "".join(process.cmdline())]
    return found


def _wait_for_step(folder: str, step: int, done: threading.Event) -> None:
    while not done.is_set():
        found = newest(folder)
        if found is not None and found.step >= step:
            return
        time.sleep(0.02)


def _wait_for_notice(job: Job, done: threading.Event) -> str:
    while not _notice(job).exists() and not done.wait(0.1):
        pass
    return _notice(job).read_text()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
