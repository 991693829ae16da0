"""What one Ray Train worker does: it learns from Ray who it is, where to go on, and whether its node is leaving."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from pipeline.logs import log_as_json
from pipeline.model.checkpoint import Progress
from pipeline.training.ranks import Ranks, agreed, joined_ranks
from pipeline.training.saver import newest
from pipeline.training.session import Job, run_session

ASK_S = 5.0  # between two questions for a notice; Ray itself looks for one every 5 s, and clouds give 30 s or more


def train_worker(loop_config: Mapping[str, Job]) -> Progress:
    """Train to the last epoch, from the run's newest checkpoint if there is one.

    Ray calls this again on every worker after a crash. Rank 0 alone looks for the checkpoint, so that all go on from
    the same one.
    """
    job, ranks = loop_config["job"], joined_ranks()
    log_as_json(stage="train", rank=ranks.rank)
    torch.set_num_threads(job.config.train.threads)  # MKL's too; whatever the environment of the node says
    found = newest(job.folder, read=True) if ranks.rank == 0 else None
    start: str | None = broadcast_from_rank_zero(found.name if found else None)
    return run_session(job, ranks, get_device(), start, Notices(ranks, get_device()).seen)


def _is_leaving() -> bool:
    """Whether Ray is draining a node of the run (a preemption notice): the same answer on every rank."""
    return ray.train.get_preemption_info() is not None


class Notices:
    """Whether the run's node is about to be taken away, asked seldom enough to cost nothing.

    Ray answers through an actor, milliseconds that a short step would feel. So rank 0's clock says when to ask: by a
    sum over the ranks, for all of them must ask as often, however unlike their clocks and steps are.

    Args:
        ranks: all of them.
        device: of this rank.
        ask: for the same answer on every rank.
    """

    def __init__(self, ranks: Ranks, device: torch.device, ask: Callable[[], bool] = _is_leaving) -> None:
        self._ranks, self._device, self._ask = ranks, device, ask
        self._asked = time.monotonic()

    def seen(self) -> bool:
        """Whether there is a notice; False where it is not time to ask. All ranks call this after every step."""
        now = time.monotonic()
        if not agreed(self._ranks, self._device, answer=now - self._asked >= ASK_S):
            return False
        self._asked = now
        return self._ask()
