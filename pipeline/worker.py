"""What one Ray Train worker does: it learns from Ray who it is, where to go on, and whether its node is leaving."""

from __future__ import annotations

from collections.abc import Mapping

import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from pipeline.checkpoint import Progress
from pipeline.ranks import joined_ranks
from pipeline.saver import newest
from pipeline.session import Job, run_session


def train_worker(loop_config: Mapping[str, Job]) -> Progress:
    """Train to the last epoch, from the run's newest checkpoint if there is one.

    Ray calls this again on every worker after a crash. Rank 0 alone looks for the checkpoint, so that all go on from
    the same one.
    """
    job, ranks = loop_config["job"], joined_ranks()
    found = newest(job.folder, read=True) if ranks.rank == 0 else None
    start: str | None = broadcast_from_rank_zero(found.name if found else None)
    return run_session(job, ranks, get_device(), start, _is_leaving)


def _is_leaving() -> bool:
    """Whether Ray is draining a node of the run (a preemption notice): the same answer on every rank."""
    return ray.train.get_preemption_info() is not None
