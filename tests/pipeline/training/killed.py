"""Trains a pickled job in child processes that kill themselves with SIGKILL at random moments; the last one may end.

`python -m tests.pipeline.training.killed JOB KILLS SEED`. Children are forked, so torch and MLflow are imported once.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import threading
import time
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401, loaded at its first use, 1 s a child
import torch

from pipeline.training.ranks import Ranks
from pipeline.training.saver import newest
from pipeline.training.session import Job, run_session


def main(path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # what it loads at its first use takes 1.5 s
    job: Job = pickle.loads(Path(path).read_bytes())
    chance = random.Random(seed)
    for _ in range(kills):
        if _child(job, chance.randrange(1, 4), chance.random()) != -signal.SIGKILL:
            sys.exit("a child ended by itself")
    if _child(job, None, 0.0) != 0:
        sys.exit("the last child failed")


def _child(job: Job, steps: int | None, part: float) -> int:
    """Exit code of a child that is killed after so many steps and a part of a step; None lets it live."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    taken, began = 0, time.monotonic()

    def after_a_step() -> bool:
        nonlocal taken, began
        taken += 1
        if taken == steps:
            threading.Timer(part * (time.monotonic() - began), os.kill, (os.getpid(), signal.SIGKILL)).start()
        began = time.monotonic()
        return False

    found = newest(job.folder)
    run_session(job, Ranks(), torch.device("cpu"), found.name if found else None, after_a_step)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
