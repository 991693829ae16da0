"""What enters the selection: every bag's chunks, checked. Malformed ones raise `ValueError` with the bag's number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ips.bag import Chunk
from ips.model import IPSModel


def checked(model: IPSModel, chunks: Iterable[tuple[int, Chunk]], sizes: Sequence[int]) -> Iterator[tuple[int, Chunk]]:
    """Pass on (bag number, chunk) pairs that `model` can take; `sizes` are the lengths of the bags."""
    shape: tuple[int, ...] | None = None
    for number, chunk in chunks:
        if shape is None:
            shape = tuple(chunk.patches.shape[1:])
        _check_patches(f"bags[{number}]", model, chunk, shape)
        _check_rows(f"bags[{number}]", model, chunk, sizes[number])
        yield number, chunk


def _check_patches(name: str, model: IPSModel, chunk: Chunk, shape: tuple[int, ...]) -> None:
    patches = chunk.patches
    found = f"{name}: patches has shape {tuple(patches.shape)} and dtype {patches.dtype}"
    if patches.ndim not in (2, 4) or (patches.dtype != torch.uint8 and not patches.is_floating_point()):
        raise ValueError(f"{found}; needs (n, C, h, w) uint8 or float, or (n, F) float")
    if patches.ndim == 2 and patches.dtype == torch.uint8:
        raise ValueError(f"{found}; features must be float")
    if tuple(patches.shape[1:]) != shape:
        raise ValueError(f"{found}; the patches before it have {shape}, and one call takes one shape")
    if min(shape) < 1:
        raise ValueError(f"{found}; every size but n must be at least 1")
    width = getattr(model.encoder, "inputs", None)
    if width is not None and shape != (width,):
        raise ValueError(f"{found}; the encoder needs features (n, {width})")
    channels = getattr(model.encoder, "channels", None if patches.ndim == 2 else patches.shape[1])
    if patches.ndim == 2 and channels is not None:
        raise ValueError(f"{found}; the encoder needs pixels, (n, {channels}, h, w)")
    if patches.ndim == 4 and (patches.shape[1] != channels or len(model.mean) not in (1, channels)):
        raise ValueError(f"{found}; the encoder needs {channels} channels, mean and std give {len(model.mean)}")
    # one cheap pass: a sum that is finite had finite terms; only where it is not, each is looked at
    if patches.is_floating_point() and not patches.sum().isfinite() and not patches.isfinite().all():
        bad = (~patches.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        raise ValueError(f"{found}; row {int(chunk.index[int(bad)])} holds NaN or infinity")


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
