"""What bags give, checked as it comes. What is malformed raises `ValueError` with the bag's number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ips.bag import Bag, Chunk
from ips.network.model import IPSModel
from ips.network.positions import check_positions

_BRIGHTEST = 1.5
"""Of float pixels, which count to 1: augmentation and resampling go a little further."""
_TOO_BRIGHT = (
    "float pixels above 1.5 are taken as they are, though they should lie in 0..1; divide those of 0..255 by 255, or "
    "give uint8 (a model of mean 0 and std 1 may take pixels that are normalised already)"
)


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of patches."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def check_bags(bags: Sequence[Bag], memory: int) -> None:
    """Refuse a selection of fewer than one patch, of no image, and of an image without patches."""
    check_count("memory", memory)
    if not isinstance(bags, Sequence):
        raise ValueError(f"bags is a {type(bags).__name__}, not a sequence; pass [bag] for one image")  # noqa: TRY004
    if not bags:
        raise ValueError("bags holds no image; pass one at least")
    for number, bag in enumerate(bags):
        if not len(bag):
            raise ValueError(f"bags[{number}] is empty; drop images without patches before the selection")


def checked(model: IPSModel, chunks: Iterable[tuple[int, Chunk]], sizes: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
    """Pass on (bag number, chunk) pairs with rows that `model` can take; `sizes` are the lengths of the bags."""
    first: Tensor | None = None
    for number, chunk in chunks:
        name = f"bags[{number}]"
        first = chunk.patches if first is None else first
        model.check_patches(chunk.patches, f"{name}: patches")
        _check_alike(name, chunk.patches, first)
        _check_finite(name, chunk)
        _check_rows(name, model, chunk, sizes[number])
        if len(chunk.index):
            yield number, chunk


def take(bags: Sequence[Bag], wanted: Sequence[tuple[int, Tensor]]) -> list[Chunk]:
    """The patches of (bag number, rows) pairs, refused where they cannot stand in one batch or are not finite.

    Positions past what the model can encode are its own to refuse (`IPSModel.places`): `gather` has no model.
    """
    taken = [take_rows(bags[number], number, rows) for number, rows in wanted]
    for (number, _), chunk in zip(wanted, taken, strict=True):
        _check_alike(f"bags[{number}]", chunk.patches, taken[0].patches)
        _check_finite(f"bags[{number}]", chunk)
        _check_positions(f"bags[{number}]", chunk)
    return taken


def take_rows(bag: Bag, number: int, rows: Tensor) -> Chunk:
    """The patches of `rows` (n,) of bag `number`, refused where the bag has no such rows or gives others."""
    name, N = f"bags[{number}]", len(bag)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < N:
        raise ValueError(
            f"{name}: rows {int(rows.min())} to {int(rows.max())} are asked for, but it has 0..{N - 1}; is the "
            "selection of these bags, in this order?"
        )
    chunk = bag.take(rows)
    check_taken(chunk, number, rows)
    return chunk


def check_taken(chunk: Chunk, number: int, rows: Tensor, method: str = "take") -> None:
    """Refuse a chunk of bag `number` that does not hold just the rows (n,) that were asked for, in that order."""
    name = f"bags[{number}]"
    if len(chunk.patches) != len(rows):
        raise ValueError(f"{name}.{method} gave {len(chunk.patches)} patches for {len(rows)} rows")
    _check_index(name, chunk)
    asked = rows.to(chunk.index.device)
    if not torch.equal(chunk.index, asked):
        place = int((chunk.index != asked).nonzero()[0])
        raise ValueError(
            f"{name}.{method} gave row {int(chunk.index[place])} where row {int(rows[place])} was asked for; it must "
            "give the rows it is asked for, in that order"
        )


def _check_alike(name: str, patches: Tensor, first: Tensor) -> None:
    """One shape, because patches are stacked; one dtype, because uint8 counts to 255 and floats to 1."""
    if patches.shape[1:] != first.shape[1:] or patches.dtype != first.dtype:
        raise ValueError(
            f"{name}: patches has shape {tuple(patches.shape)} and dtype {patches.dtype}; the patches before it have "
            f"{tuple(first.shape[1:])} and {first.dtype}, and one call takes one shape and one dtype"
        )


def _check_finite(name: str, chunk: Chunk) -> None:
    patches = chunk.patches
    if not patches.is_floating_point() or not patches.numel():
        return
    low, high = torch.stack(torch.aminmax(patches)).tolist()  # one pass, which NaN and infinity come through
    if not math.isfinite(low) or not math.isfinite(high):
        bad = (~patches.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        raise ValueError(f"{name}: patches: row {int(chunk.index[int(bad)])} holds NaN or infinity")
    if patches.ndim == 4 and high > _BRIGHTEST:
        warnings.warn(_TOO_BRIGHT, stacklevel=1)  # the same words at one place: once, by Python's own filter


def _check_index(name: str, chunk: Chunk) -> None:
    index = chunk.index
    if index.shape != chunk.patches.shape[:1] or index.dtype != torch.int64:
        raise ValueError(
            f"{name}: index has shape {tuple(index.shape)}, {index.dtype}; needs ({len(chunk.patches)},) int64"
        )


def _check_rows(name: str, model: IPSModel, chunk: Chunk, N: int) -> None:
    index = chunk.index
    _check_index(name, chunk)
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < N:
        raise ValueError(f"{name}: index reaches from {int(index.min())} to {int(index.max())}; rows are 0..{N - 1}")
    _check_positions(name, chunk, model.position_limit)


def _check_positions(name: str, chunk: Chunk, limit: float = math.inf) -> None:
    positions = chunk.positions
    if positions is None:
        return
    if positions.shape != (len(chunk.index), 2):
        raise ValueError(f"{name}: positions has shape {tuple(positions.shape)}; needs ({len(chunk.index)}, 2)")
    check_positions(positions, limit, f"{name}: positions")


def check_logits(number: int, index: Tensor, logits: Tensor) -> None:
    """Refuse NaN and infinity in logits (n, J) of rows (n,)."""
    if not logits.isfinite().all():
        row = int(index[int((~logits.isfinite()).any(dim=1).nonzero()[0])])
        raise ValueError(f"bags[{number}]: the logits of row {row} are NaN or infinite; the weights may have diverged")


def check_again(number: int, rows: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype) -> None:
    """Refuse rows (n,) whose logits (n, J) are others the second time: sums without them would lose what was not there.

    They are the same bit for bit, but for encoders that round by their batch in `dtype`.
    """
    if not len(rows):
        return
    rounding = 2e-2 if dtype.itemsize == 2 else 1e-3  # of the largest; a patch turned round differs by 1e-1
    other = ((first - second).abs() > rounding * first.abs().amax(dim=0)).any(dim=1)
    if other.any():
        raise ValueError(
            f"bags[{number}].take gave another patch of row {int(rows[other][0])} than the pass over all patches, and "
            "context='rest' takes off what that one added; draw an augmentation by the row and the epoch, not anew "
            "each time"
        )
