"""What bags give, checked as it comes. What is malformed raises `ValueError` with the bag's number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ips.bag import Bag, Chunk
from ips.model import IPSModel


def check_bags(bags: Sequence[Bag], memory: int) -> None:
    """Refuse a selection of fewer than one patch, of no image, and of an image without patches."""
    if memory < 1:
        raise ValueError(f"memory={memory} must be at least 1")
    if not bags:
        raise ValueError("bags holds no image; pass one at least")
    for number, bag in enumerate(bags):
        if not len(bag):
            raise ValueError(f"bags[{number}] is empty; drop images without patches before the selection")


def checked(model: IPSModel, chunks: Iterable[tuple[int, Chunk]], sizes: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
    """Pass on (bag number, chunk) pairs that `model` can take; `sizes` are the lengths of the bags."""
    first: Tensor | None = None
    for number, chunk in chunks:
        name = f"bags[{number}]"
        first = chunk.patches if first is None else first
        model.check_patches(chunk.patches, f"{name}: patches")
        _check_alike(name, chunk.patches, first)
        _check_finite(name, chunk)
        _check_rows(name, model, chunk, sizes[number])
        yield number, chunk


def take(bags: Sequence[Bag], wanted: Sequence[tuple[int, Tensor]]) -> list[Chunk]:
    """The patches of (bag number, rows) pairs, refused where they cannot stand in one batch or are not finite."""
    taken = [bags[number].take(rows) for number, rows in wanted]
    for (number, rows), chunk in zip(wanted, taken, strict=True):
        if len(chunk.patches) != len(rows):
            raise ValueError(f"bags[{number}].take gave {len(chunk.patches)} patches for {len(rows)} rows")
        _check_alike(f"bags[{number}]", chunk.patches, taken[0].patches)
        _check_finite(f"bags[{number}]", chunk)
    return taken


def _check_alike(name: str, patches: Tensor, first: Tensor) -> None:
    """One shape, because patches are stacked; one dtype, because uint8 counts to 255 and floats to 1."""
    if patches.shape[1:] != first.shape[1:] or patches.dtype != first.dtype:
        raise ValueError(
            f"{name}: patches has shape {tuple(patches.shape)} and dtype {patches.dtype}; the patches before it have "
            f"{tuple(first.shape[1:])} and {first.dtype}, and one call takes one shape and one dtype"
        )


def _check_finite(name: str, chunk: Chunk) -> None:
    patches = chunk.patches
    # one cheap pass: a sum that is finite had finite terms; only where it is not, each is looked at
    if patches.is_floating_point() and not patches.sum().isfinite() and not patches.isfinite().all():
        bad = (~patches.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        raise ValueError(f"{name}: patches: row {int(chunk.index[int(bad)])} holds NaN or infinity")


def _check_rows(name: str, model: IPSModel, chunk: Chunk, N: int) -> None:
    index, positions = chunk.index, chunk.positions
    if index.shape != chunk.patches.shape[:1] or index.dtype != torch.int64:
        raise ValueError(
            f"{name}: index has shape {tuple(index.shape)}, {index.dtype}; needs ({len(chunk.patches)},) int64"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < N:
        raise ValueError(f"{name}: index reaches from {int(index.min())} to {int(index.max())}; rows are 0..{N - 1}")
    if positions is None:
        return
    if positions.shape != (len(index), 2):
        raise ValueError(f"{name}: positions has shape {tuple(positions.shape)}; needs ({len(index)}, 2)")
    limit = getattr(model.position, "limit", float("inf"))
    if not ((positions >= 0) & (positions < limit)).all():
        low, high = positions.min().item(), positions.max().item()
        raise ValueError(f"{name}: positions reach from {low:g} to {high:g}; they must be finite, >= 0 and < {limit:g}")


def check_logits(number: int, index: Tensor, logits: Tensor) -> None:
    """Refuse NaN and infinity in logits (n, J) of rows (n,)."""
    if not logits.isfinite().all():
        row = int(index[int((~logits.isfinite()).any(dim=1).nonzero()[0])])
        raise ValueError(f"bags[{number}]: the logits of row {row} are NaN or infinite; the weights may have diverged")
