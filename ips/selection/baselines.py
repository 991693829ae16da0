"""What selection has to beat: other ways to choose patches. Same model, same bags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ips.bag import Bag, Selection
from ips.selection.intake import check_bags
from ips.selection.select import assemble


def random_selection(bags: Sequence[Bag], memory: int, generator: torch.Generator) -> Selection:
    """M different patches of each image, drawn uniformly; every score is 1 / N. ValueError where `select` raises it."""
    check_bags(bags, memory)
    draws = [torch.randperm(len(bag), generator=generator)[:memory] for bag in bags]
    sizes = [len(bag) for bag in bags]
    return assemble([(rows, _uniform(rows, N)) for rows, N in zip(draws, sizes, strict=True)], memory, sizes)


def every_patch(bags: Sequence[Bag]) -> Selection:
    """All patches of each image, in order: full attention, where it fits. ValueError for no bags and for empty ones."""
    check_bags(bags, memory=1)
    sizes = [len(bag) for bag in bags]
    return assemble([(torch.arange(N), _uniform(torch.arange(N), N)) for N in sizes], max(sizes), sizes)


def _uniform(rows: Tensor, N: int) -> Tensor:
    return torch.full(rows.shape, -math.log(N), dtype=torch.float64)
