"""What selection has to beat: other ways to choose patches. Same model, same bags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ips.bag import Bag, Selection
from ips.selection.intake import check_bags
from ips.selection.ranking import best
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


@dataclass(frozen=True)
class RandomDraw:
    """`draw` of `select`: M patches, uniformly, whatever they score; for what is pooled beside them."""

    generator: torch.Generator

    def __call__(self, keys: Tensor, memory: int) -> Tensor:
        """Log scores (N,) -> rows (<= M,)."""
        return torch.randperm(len(keys), generator=self.generator)[:memory]


@dataclass(frozen=True)
class HalfByScore:
    """`draw` of `select`, the rule of DBPS in training: half of the best M, and as many of the others.

    Both are drawn without replacement by the softmax of the scores; which is nearly uniform, as scores sum to 1. With
    `context="rest"`, what is not drawn is pooled too, as there. (At evaluation DBPS takes the best.)
    """

    generator: torch.Generator

    def __call__(self, keys: Tensor, memory: int) -> Tensor:
        """Log scores (N,) -> rows (<= M,), those of the first half first."""
        order = best(keys, torch.arange(len(keys)), len(keys))
        top, others = order[:memory], order[memory:]
        first = self._drawn(keys, top, len(top) if not len(others) else -(-memory // 2))
        return torch.cat((first, self._drawn(keys, others, memory - len(first))))

    def _drawn(self, keys: Tensor, rows: Tensor, count: int) -> Tensor:
        """At most `count` of `rows`, by the softmax of their scores; by Gumbel's trick, which takes any number."""
        noise = -torch.empty(len(rows), dtype=torch.float64).exponential_(generator=self.generator).log()
        return rows[(keys[rows].exp() + noise).topk(min(count, len(rows))).indices]


def transferred(selection: Selection, positions: Sequence[Tensor], onto: Sequence[Tensor], scale: float) -> Selection:
    """Winners of one tiling as those of another of the same images, each the patch around its middle (EAGLE's rule).

    A scorer that sees little magnification names M places; another network, such as one with `MeanPool`, looks at them
    closely. Places that fall into one patch count once, those in none are left out.

    Args:
        selection: in the first tiling.
        positions: per image (N, 2), grid positions (column, row) of the first tiling.
        onto: per image (N', 2), those of the second.
        scale: edge of a patch of the first tiling over that of the second.

    Raises:
        ValueError: other images; none of an image's winners lies in a patch of the second tiling.
    """
    if not len(positions) == len(onto) == len(selection.index):
        raise ValueError(
            f"positions has {len(positions)} images, onto {len(onto)}, the selection {len(selection.index)}"
        )
    found = []
    for number, (low, high) in enumerate(zip(positions, onto, strict=True)):
        rows = {(int(x), int(y)): row for row, (x, y) in enumerate(high.tolist())}
        won = selection.index[number][selection.mask[number]]
        middles = ((low[won].double() + 0.5) * scale).long().tolist()
        places = [rows[x, y] for x, y in middles if (x, y) in rows]
        if not places:
            raise ValueError(
                f"onto[{number}]: no patch of it lies where a winner is; are scale={scale:g} and the image right?"
            )
        kept = torch.tensor(list(dict.fromkeys(places)))
        found.append((kept, torch.full(kept.shape, -math.log(len(kept)), dtype=torch.float64)))
    return assemble(found, selection.index.shape[1], [len(high) for high in onto])


def _uniform(rows: Tensor, N: int) -> Tensor:
    return torch.full(rows.shape, -math.log(N), dtype=torch.float64)
