"""What flows through selection: chunks in, winners out. Tensors only.

Shapes: B images, N patches of an image, M patches kept (memory), I patches read at a time (chunk), D width of an
embedding, H attention heads, T tasks (query tokens), J = H*T logits of a patch, C channels, (h, w) patch size in px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Chunk:
    """Some patches of one image."""

    patches: Tensor
    """(n, C, h, w) pixels, uint8 or float in 0..1; or (n, F) float features."""
    index: Tensor
    """(n,) int64, the rows these patches have within their bag."""
    positions: Tensor | None = None
    """(n, 2) float32 (column, row) in grid units."""
    prepare: Callable[[Tensor], Tensor] | None = None
    """What is still to be done to the patches once they are on the device, such as augmentation: patches to patches of
    the same shape and dtype, each for itself, so that a row gives the same in every chunk it comes in."""


class Bag(Protocol):
    """The N patches of one image, wherever they are kept."""

    def __len__(self) -> int:
        """N."""
        ...

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, at most `size` rows at a time.

        The memory of a chunk may be filled anew for the next one, unless it is pinned: then it may still be on its way.
        """
        ...

    def take(self, rows: Tensor) -> Chunk:
        """The patches of `rows` (n,) int64, in that order."""
        ...


class TensorBag:
    """A bag whose patches lie in memory.

    Args:
        patches: (N, C, h, w) pixels or (N, F) features.
        positions: (N, 2) float32 (column, row), or None.

    Raises:
        ValueError: `positions` does not fit `patches`.
    """

    def __init__(self, patches: Tensor, positions: Tensor | None = None) -> None:
        if positions is not None and positions.shape != (len(patches), 2):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}; {len(patches)} patches need ({len(patches)}, 2)"
            )
        self.patches = patches
        self.positions = positions

    def __len__(self) -> int:
        return len(self.patches)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Rows in order, as views."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            positions = None if self.positions is None else self.positions[start:stop]
            yield Chunk(self.patches[start:stop], torch.arange(start, stop), positions)

    def take(self, rows: Tensor) -> Chunk:
        """A copy of the patches of `rows`."""
        at = rows.to(self.patches.device)
        positions = None if self.positions is None else self.positions[rows.to(self.positions.device)]
        return Chunk(self.patches[at], rows, positions)


@dataclass(frozen=True)
class Context:
    """What some patches of each of B images put into the pool, in few numbers (`ips.network.context`).

    float64, on the model's device; the patches may be any number, and none.
    """

    log_mass: Tensor
    """(B, J): log sum_n exp(l_nj) over the patches; -inf for none."""
    mean: Tensor
    """(B, J, D): sum_n a_nj x_n, with a the softmax over these patches and x an embedding with its position."""
    second: Tensor | None = None
    """(B, J, D, D_v): sum_n a_nj x_n (V_j x_n)^T with the values' projection V_j, as learning from them needs it."""


@dataclass(frozen=True)
class Values:
    """What the patches of one image put into the pool, one by one; on the host."""

    logits: Tensor
    """(N, J)."""
    values: Tensor
    """(N, H, D_v): x_n, with its position, through each head's values' projection."""


@dataclass(frozen=True)
class Certificate:
    """How one image's low-precision selection compares with float32 (measured on a sample, not proven)."""

    error: float
    """Largest difference of a log score between the two precisions, seen on the sample; for rank heads of any
    head's logit."""
    band: int
    """Patches within 2 * error of the M-th log score; all of them were scored again in float32. For rank heads, what a
    head would take by a logit higher by twice its own error."""
    changed: int
    """Winners that the second scoring replaced."""


@dataclass(frozen=True)
class Selection:
    """The M winners of each of B images, best first."""

    index: Tensor
    """(B, M) int64 rows within each bag, on the host; -1 where `mask` is False."""
    mask: Tensor
    """(B, M) bool, True where a real patch stands (a bag may be shorter than M)."""
    scores: Tensor
    """(B, M) float32, softmax weight averaged over heads and tasks; 0 where masked. The softmax runs over `scored`
    patches of the image: only where those are all is this its attention."""
    attention: tuple[Tensor, ...] | None = None
    """Per image (N,) float32: the mean over H*T of the softmax over the whole image; sums to 1. Or, where each head and
    task was asked for, (N, H, T), each of which sums to 1."""
    certificates: tuple[Certificate, ...] | None = None
    """Per image, when asked for."""
    scored: Tensor | None = None
    """(B,) int64, patches that the softmax of `scores` runs over: all N; in `window` those of the last pool, at most
    M + I."""
    whole: Context | None = None
    """Of all N patches, when asked for."""
    rest: Context | None = None
    """Of the N - M patches that are no winners, when asked for."""
    weights: Tensor | None = None
    """(B, M) float32, where winners were drawn: what the gradient of each to the encoder is multiplied by; 0 where
    masked."""
    values: tuple[Values, ...] | None = None
    """Per image, when asked for."""


@dataclass(frozen=True)
class Batch:
    """The winners' patches, padded to M; a pytree, for `torch.export` and whatever else maps over tensors.

    Raises:
        ValueError: the parts are not of one B and M, or an image has no patch.
    """

    patches: Tensor
    """(B, M, ...) as the bags give them; zeros where masked, and never encoded there."""
    positions: Tensor | None
    """(B, M, 2) float32, or None."""
    index: Tensor
    """(B, M) int64."""
    mask: Tensor
    """(B, M) bool."""
    rest: Context | None = None
    """Of the patches that are not here, so that the model pools all N."""
    weights: Tensor | None = None
    """(B, M): what the gradient of each patch's embedding is multiplied by; None: nothing."""
    real: Tensor = field(init=False)
    """(n,) int64, where the mask is True: b * M + m. Found once, so that a model need not wait for its device."""

    def __post_init__(self) -> None:
        needed = {"index": tuple(self.mask.shape), "patches": (*self.mask.shape, *self.patches.shape[2:])}
        if self.positions is not None:
            needed["positions"] = (*self.mask.shape, 2)
        if self.weights is not None:
            needed["weights"] = tuple(self.mask.shape)
        for name, shape in needed.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}; with mask {tuple(self.mask.shape)} it needs {shape}")
        check_mask(self.mask)
        object.__setattr__(self, "real", self.mask.flatten().nonzero().squeeze(1))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same on `device`."""
        moved: Batch = pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=non_blocking), self)
        return moved


def _register(kind: type, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Make a dataclass a pytree of its fields `names`, and of those `optional` ones that are not None.

    Parts may be anything that stands for a tensor, so nothing is checked.
    """

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        held = " ".join(name for name in optional if getattr(value, name) is not None) or None  # as programs have it
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in _fields(held)], held

    def _fields(held: str | None) -> tuple[str, ...]:
        return (*names, *(held or "").split())

    def unflatten(parts: Any, held: Any) -> Any:
        value: Any = object.__new__(kind)
        for name in optional:
            object.__setattr__(value, name, None)
        for name, part in zip(_fields(held), parts, strict=True):
            object.__setattr__(value, name, part)
        return value

    pytree.register_pytree_node(
        kind,
        lambda value: ([part for _, part in flatten(value)[0]], flatten(value)[1]),
        unflatten,
        serialized_type_name=f"ips.bag.{kind.__name__}",
        flatten_with_keys_fn=flatten,
    )


_register(Context, ("log_mass", "mean", "second"))
_register(Batch, ("patches", "positions", "index", "mask", "real"), ("rest", "weights"))  # as before, without them
torch.serialization.add_safe_globals([Batch, Context])  # an exported program carries the one that it was made with


def check_mask(mask: Tensor) -> None:
    """Refuse, by ValueError, a mask (B, M) in which an image has no patch."""
    if not mask.any(dim=1).all():
        raise ValueError(
            f"mask: image {int((~mask.any(dim=1)).nonzero()[0])} of {len(mask)} has no patch; each needs one"
        )


def collate(items: Sequence[tuple[Bag, Mapping[str, Any]]]) -> tuple[list[Bag], dict[str, Tensor]]:
    """(bag, task -> label) pairs -> bags, and targets task -> (B, ...) for `task_loss`: a DataLoader's `collate_fn`.

    A label is a number, or several, or a tensor; None or an absent task is a missing label, NaN.

    Raises:
        ValueError: labels of one task that have different shapes, or are no numbers.
    """
    tasks = dict.fromkeys(task for _, labels in items for task in labels)
    targets = {task: _stacked(task, [labels.get(task) for _, labels in items]) for task in tasks}
    return [bag for bag, _ in items], targets


def _stacked(task: str, labels: Sequence[Any]) -> Tensor:
    try:
        known = [None if label is None else torch.as_tensor(label) for label in labels]
        shape = next((label.shape for label in known if label is not None), torch.Size())
        return torch.stack([torch.full(shape, math.nan) if label is None else label for label in known])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"labels of task {task!r} cannot be stacked: {error}; give numbers of one shape") from error
