"""Trains a pickled job on a Ray cluster that loses first a worker process, then the node it ran on.

`python -m tests.pipeline.lost_node JOB`: the job's run comes to its end, or the exit code is not 0.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster import prepare_environment
from pipeline.saver import newest
from pipeline.session import Job
from pipeline.train import train

_MEMORY = 100 * 2**20  # of an object store


def main(path: str) -> None:
    job: Job = pickle.loads(Path(path).read_bytes())
    prepare_environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _MEMORY})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    done = threading.Event()

    def harm() -> None:
        _wait_for_step(job.folder, 8, done)
        worker = _worker()
        worker.kill()
        print(f"killed worker {worker.pid}", flush=True)
        _wait_for_step(job.folder, 28, done)
        raylet = _worker().ppid()
        (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet]
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


def _worker() -> psutil.Process:
    """The only training worker."""
    children = psutil.Process().children(recursive=True)
    (worker,) = [process for process in children if "RayTrainWorker" in "".join(process.cmdline())]
    return worker


def _wait_for_step(folder: str, step: int, done: threading.Event) -> None:
    while not done.is_set():
        found = newest(folder)
        if found is not None and found.step >= step:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1])
