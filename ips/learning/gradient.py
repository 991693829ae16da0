"""One backward pass through B x M patches in the memory of `chunk` of them.

    1. encode the winners chunk by chunk without gradient; keep the embeddings, B * M * D numbers
    2. aggregator, heads and loss on those, with gradient: dL/d(embedding)
    3. take and encode each chunk again, with gradient, and send its part of dL/d(embedding) through

Chain rule, no approximation: the gradient is that of the plain step over the same chunks, to rounding. Both passes see
the same chunks and the same dropout; the running statistics of batch norms move in the second only. (What else counts,
the statistics of an instance norm or the iterations of a spectral norm, moves in both.) The patches are taken from the
bags twice and never held together. An encoder without trainable parameters is passed once, and its statistics move in
that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ips.bag import Bag, Chunk, Selection
from ips.learning.processes import average_gradients, average_statistics
from ips.network.model import IPSModel, layers, unwrapped
from ips.selection.intake import check_count, take
from ips.selection.scorer import BATCH_NORMS, check_statistics
from ips.selection.select import placed
from ips.selection.transfer import arrived
from ips.selection.unique import row_hashes

Norm = Literal["frozen", "group"]
Loss = Callable[[dict[str, Tensor]], Tensor]


def bounded_backward(
    model: nn.Module,
    bags: Sequence[Bag],
    selection: Selection,
    loss: Loss,
    chunk: int,
    norm: Norm = "frozen",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the loss on the selected patches to the parameters' `grad`.

    Args:
        model: an `IPSModel`, in training mode or not: its modes hold, but for `norm`. In DistributedDataParallel too:
            then all processes call this together, and the gradients are averaged over them at the end (not in its
            `no_sync`), as are the running statistics with `group`.
        bags: B bags; `take` must give the same patches twice.
        selection: of these bags.
        loss: task -> logits (B, K) to a scalar.
        chunk: patches encoded at a time, over images; the rest is spread so that chunks differ by one at most.
        norm: `frozen`: the encoder's batch norms use their running statistics. `group`: those of each chunk, and the
            running ones move chunk by chunk. (Statistics over the whole batch, as in the paper, need all patches at
            once: the plain step.)
        dtype: of autocast, if of 16 bits; others mean the model's own and turn it off.

    Returns:
        The loss and the logits, detached.

    Raises:
        ValueError: `chunk` < 1 or one that leaves a patch alone with `group`, another `norm`, a selection of other
            bags, `frozen` norms without running statistics, an image without patches, patches and positions that the
            model cannot take, a loss that does not depend on them, or a bag that gives other patches the second time
            (the gradients are of no use then).
    """
    wrappers = layers(model)
    value, outputs = _backward(unwrapped(model), bags, selection, loss, chunk, norm, dtype)
    for wrapper in wrappers:
        if isinstance(wrapper, DistributedDataParallel) and wrapper.require_backward_grad_sync:
            average_gradients(wrapper, wrapper.process_group)
            if norm == "group":
                average_statistics(wrapper, wrapper.process_group)
    return value, outputs


def _backward(
    model: IPSModel,
    bags: Sequence[Bag],
    selection: Selection,
    loss: Loss,
    chunk: int,
    norm: Norm,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`bounded_backward` of this process."""
    _check(model.encoder, bags, selection, chunk, norm)
    device = model.mean.device
    parts = _parts(selection, chunk)
    if norm == "group":
        _check_none_alone(model.encoder, parts, chunk)
    twice = any(parameter.requires_grad for parameter in model.encoder.parameters())
    with _norms(model.encoder, norm):
        with _statistics_held(model.encoder) if twice else nullcontext():
            embeddings, positions, before = _embed_all(model, bags, parts, dtype)
        leaf = embeddings.requires_grad_()
        places = model.places(selection.index, placed(positions, selection))
        places = None if places is None else places.to(device)
        real = selection.mask.flatten().nonzero().squeeze(1).to(device)
        with _autocast(device, dtype):
            weights = None if selection.weights is None else selection.weights.to(device)
            outputs = model.pool(leaf, selection.mask.to(device), places, real, selection.rest, weights)
            value = loss(outputs)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        if leaf.grad is None:
            raise ValueError(
                "loss: it does not depend on the patches; compute it from the logits, without detaching them"
            )
        if twice:
            _backward_all(model, bags, parts, leaf.grad, before, dtype)
    return value.detach(), {task: logits.detach() for task, logits in outputs.items()}


def _check(encoder: nn.Module, bags: Sequence[Bag], selection: Selection, chunk: int, norm: str) -> None:
    check_count("chunk", chunk)
    if norm not in ("frozen", "group"):
        raise ValueError(f"norm={norm!r} must be 'frozen' or 'group'")
    if len(bags) != len(selection.index):
        raise ValueError(f"bags has {len(bags)} images, the selection {len(selection.index)}")
    if not selection.mask.any(dim=1).all():
        number = int((~selection.mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"selection: nothing of bags[{number}] is selected; every image needs one patch")
    if norm == "frozen":
        check_statistics(encoder)


_Part = list[tuple[int, Tensor]]
"""Rows to take, by bag number."""


def _parts(selection: Selection, chunk: int) -> list[_Part]:
    """The winners, image by image, cut into chunks of equal size (to one patch)."""
    image, place = selection.mask.nonzero(as_tuple=True)
    rows = selection.index[image, place]
    count = -(-len(rows) // chunk)
    return [
        [(int(number), part_rows[part_image == number]) for number in torch.unique_consecutive(part_image)]
        for part_image, part_rows in zip(image.tensor_split(count), rows.tensor_split(count), strict=True)
    ]


def _check_none_alone(encoder: nn.Module, parts: list[_Part], chunk: int) -> None:
    """Refuse a chunk of one embedding for a norm of embeddings; a map of several pixels has statistics of its own."""
    sizes = [sum(len(rows) for _, rows in part) for part in parts]
    if min(sizes) < 2 and any(isinstance(module, nn.BatchNorm1d) and module.training for module in encoder.modules()):
        raise ValueError(
            f"chunk={chunk}: of {sum(sizes)} patches it leaves one alone, which has no statistics for norm='group'; "
            "change chunk or use norm='frozen'"
        )


def _take(bags: Sequence[Bag], part: _Part, device: torch.device) -> tuple[Tensor, list[Chunk]]:
    chunks = take(bags, part)
    return torch.cat([arrived(chunk, device) for chunk in chunks]), chunks


def _embed_all(
    model: IPSModel, bags: Sequence[Bag], parts: list[_Part], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[_Before]]:
    """Embeddings (n, D) of all winners, their positions, and what the second pass needs to know of each chunk."""
    device = model.mean.device
    embeddings, positions, before = [], [], []
    with torch.no_grad():
        for part in parts:
            patches, chunks = _take(bags, part, device)
            before.append(_Before(_RngState(device), row_hashes(patches)))
            with _autocast(device, dtype):
                embeddings.append(model.embed(patches))
            positions += [chunk.positions for chunk in chunks if chunk.positions is not None]
    return torch.cat(embeddings), positions, before


def _backward_all(
    model: IPSModel,
    bags: Sequence[Bag],
    parts: list[_Part],
    gradient: Tensor,
    before: list[_Before],
    dtype: torch.dtype,
) -> None:
    device, after = model.mean.device, _RngState(model.mean.device)
    start = 0
    same = []
    try:
        for part, first in zip(parts, before, strict=True):
            patches, _ = _take(bags, part, device)
            same.append(row_hashes(patches) == first.hashes)
            first.rng.restore()
            with _autocast(device, dtype):
                embeddings = model.embed(patches)
            stop = start + len(patches)
            embeddings.backward(gradient[start:stop])  # type: ignore[no-untyped-call]
            start = stop
    finally:
        after.restore()
    _check_same(parts, torch.cat(same))


def _check_same(parts: list[_Part], same: Tensor) -> None:
    """Refuse what no chain rule holds for: patches (n,) that were others in the second pass. The one read of a step."""
    if same.all():
        return
    rows = [(number, row) for part in parts for number, rows in part for row in rows.tolist()]
    number, row = rows[int((~same).nonzero()[0])]
    raise ValueError(
        f"bags[{number}].take gave another patch of row {row} the second time, and the gradients added are of no use; "
        "draw an augmentation by the row and the epoch, not anew each time"
    )


class _Before(NamedTuple):
    """A chunk in the first pass."""

    rng: _RngState
    hashes: Tensor
    """(n,) of its patches."""


class _RngState:
    """The generators that dropout on `device` draws from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2)


@contextmanager
def _norms(encoder: nn.Module, norm: Norm) -> Iterator[None]:
    """With `frozen`, batch norms in evaluation mode inside."""
    live = [module for module in encoder.modules() if isinstance(module, BATCH_NORMS) and module.training]
    for module in live:
        module.training = norm == "group"
    try:
        yield
    finally:
        for module in live:
            module.training = True


@contextmanager
def _statistics_held(encoder: nn.Module) -> Iterator[None]:
    """Batch norms in training mode use a chunk's statistics inside, without moving the running ones."""
    live = [m for m in encoder.modules() if isinstance(m, BATCH_NORMS) and m.training and m.track_running_stats]
    for module in live:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in live:
            module.track_running_stats = True
