"""Two gloo processes on this machine, for tests of what ranks do together."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def one_of_two(rank: int, folder: str) -> Iterator[None]:
    """In a process group of two for as long as this lasts; both meet at a file in `folder`.

    Models and errors of the block must not outlive it: through them the group's threads would still be there when the
    interpreter ends, and one of them that then asks for its lock aborts the process.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        yield
    finally:
        gc.collect()  # frames of an error refer to themselves
        dist.destroy_process_group()
