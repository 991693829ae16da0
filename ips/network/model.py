"""The network: encoder, optional positions, aggregator, heads. Composition only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ips.bag import Batch
from ips.network.aggregator import Aggregator
from ips.network.positions import IndexPositions, check_positions
from ips.network.strided import guard


class IPSModel(nn.Module):
    """Patches of an image -> logits of every task (paper section 3).

    Args:
        encoder: (n, C, h, w) or (n, F) -> (n, D); where it says `dim`, that is D, and other patches than its
            `channels` or `inputs` say are refused. Its strided convolutions become `ips.network.strided.Strided`.
        aggregator: `Aggregator`, or one of `ips.network.pooling` with the same `forward` and `tasks`.
        heads: task -> head (B, D) -> (B, K); the i-th head reads the i-th token.
        position: `GridPositions`, `IndexPositions` or None; added to embeddings after the encoder.
        mean: per channel, of pixels scaled to 0..1. Features are never normalised.
        std: per channel.

    Raises:
        ValueError: as many heads as the aggregator has tasks are needed; encoder, aggregator, position and heads are
            of different widths; `mean` and `std` differ in length.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        aggregator: nn.Module,
        heads: Mapping[str, nn.Module],
        position: nn.Module | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if len(heads) != aggregator.tasks:
            raise ValueError(f"heads has {len(heads)} tasks {list(heads)}, the aggregator {aggregator.tasks} tokens")
        parts = {"encoder": encoder, "aggregator": aggregator, "position": position}
        widths: dict[str, Any] = {
            name: part.dim for name, part in parts.items() if part is not None and hasattr(part, "dim")
        }
        for task, head in heads.items():
            if width := getattr(head, "in_features", 0):  # a lazy layer says 0 until it is used
                widths[f"heads[{task!r}]"] = width
        if len(set(widths.values())) > 1:
            raise ValueError(f"encoder, aggregator, position and heads need one width D, found {widths}")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} need equal lengths and std > 0")
        self.dim: int | None = next(iter(widths.values()), None)
        """D, where a part says it."""
        guard(encoder)
        self.encoder, self.aggregator, self.position = encoder, aggregator, position
        self.tasks = tuple(heads)
        self.heads = nn.ModuleList(heads.values())  # a list: task names may hold dots, module names may not
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, patches: Tensor) -> Tensor:
        """Pixels (n, C, h, w), uint8 or float in 0..1 -> (x - mean) / std in the model's dtype. Features pass."""
        return normalised(patches, self.mean, self.std)

    def check_patches(self, patches: Tensor, name: str = "patches") -> None:
        """Refuse, by ValueError, patches of a shape or dtype that the encoder cannot take."""
        found = f"{name} has shape {tuple(patches.shape)} and dtype {patches.dtype}"
        if patches.ndim not in (2, 4) or (patches.dtype != torch.uint8 and not patches.is_floating_point()):
            raise ValueError(f"{found}; needs (n, C, h, w) uint8 or float, or (n, F) float")
        if patches.ndim == 2 and patches.dtype == torch.uint8:
            raise ValueError(f"{found}; features must be float")
        if min(patches.shape[1:]) < 1:
            raise ValueError(f"{found}; every size but n must be at least 1")
        width = getattr(self.encoder, "inputs", None)
        if width is not None and patches.shape[1:] != (width,):
            raise ValueError(f"{found}; the encoder needs features (n, {width})")
        channels = getattr(self.encoder, "channels", None if patches.ndim == 2 else patches.shape[1])
        if patches.ndim == 2 and channels is not None:
            raise ValueError(f"{found}; the encoder needs pixels, (n, {channels}, h, w)")
        if patches.ndim == 4 and (patches.shape[1] != channels or len(self.mean) not in (1, channels)):
            raise ValueError(f"{found}; the encoder needs {channels} channels, mean and std give {len(self.mean)}")

    def embed(self, patches: Tensor) -> Tensor:
        """(n, C, h, w) or (n, F), on the model's device -> (n, D), without positions.

        Raises:
            ValueError: where `check_patches` or `check_embeddings` raises it.
        """
        self.check_patches(patches)
        embeddings: Tensor = self.encoder(self.normalise(patches))
        self.check_embeddings(embeddings, patches)
        return embeddings

    def check_embeddings(self, embeddings: object, patches: Tensor) -> None:
        """Refuse, by ValueError, what the encoder made of patches (n, ...) if it is not (n, D)."""
        if not isinstance(embeddings, Tensor):
            raise ValueError(  # noqa: TRY004
                f"encoder: {type(self.encoder).__name__} gives a {type(embeddings).__name__}; needs one tensor (n, D)"
            )
        n, found = len(patches), tuple(embeddings.shape)
        if found != (n, self.dim if self.dim is not None or len(found) != 2 else found[1]):
            raise ValueError(
                f"encoder: {type(self.encoder).__name__} gives shape {found} for patches {tuple(patches.shape)}; needs "
                f"({n}, {self.dim or 'D'}), so pool its map, remove its classifier, or build the other parts for its D"
            )

    def places(self, index: Tensor, positions: Tensor | None) -> Tensor | None:
        """What the position encoding reads: the index, the grid positions, or nothing.

        Raises:
            ValueError: the model encodes grid positions, and the bag has none or has some that are out of range.
        """
        if self.position is None:
            return None
        if isinstance(self.position, IndexPositions):
            return index
        if positions is None:
            raise ValueError("positions: the model encodes grid positions, but the bag gives none; add them to it")
        check_positions(positions, getattr(self.position, "limit", math.inf), "positions")
        return positions

    def logits(self, embeddings: Tensor, places: Tensor | None) -> Tensor:
        """Attention logits of embeddings (n, D) at `places` (see `places`) -> (n, J), J = H*T."""
        if self.position is not None and places is not None:
            embeddings = embeddings + self.position(places)
        aggregator = self.aggregator
        if not isinstance(aggregator, Aggregator):
            raise ValueError(f"aggregator: {type(aggregator).__name__} has no attention logits; use Aggregator")  # noqa: TRY004
        return nn.functional.linear(embeddings, aggregator.folded())

    def pool(self, embeddings: Tensor, mask: Tensor, places: Tensor | None) -> dict[str, Tensor]:
        """Embeddings (n, D) of the real winners, in the order of mask (B, M) -> task -> logits (B, K).

        `places` (B, M, ...) is what `places` gives. Masked embeddings become zeros and are never attended to.

        Raises:
            ValueError: an image of which nothing is unmasked.
        """
        B, M = mask.shape
        if not mask.any(dim=1).all():
            raise ValueError(f"mask: image {int((~mask.any(dim=1)).nonzero()[0])} of {B} has no patch; each needs one")
        padded = embeddings.new_zeros(B * M, embeddings.shape[-1])
        embeddings = padded.index_copy(0, mask.flatten().nonzero().squeeze(1), embeddings).view(B, M, -1)
        if self.position is not None and places is not None:
            embeddings = embeddings + self.position(places)
        tokens = self.aggregator(embeddings, mask)
        return {task: head(tokens[:, i]) for i, (task, head) in enumerate(zip(self.tasks, self.heads, strict=True))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Winners -> task -> logits (B, K). Masked places are never encoded, so they touch no batch statistics."""
        places = self.places(batch.index, batch.positions)  # checked before a device has work to be waited for
        return self.pool(self.embed(batch.patches[batch.mask]), batch.mask, places)


def normalised(patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`IPSModel.normalise` with mean and std (C, 1, 1) at hand; the result has their dtype."""
    x = patches.to(mean.dtype)
    if patches.ndim == 2:
        return x
    return ((x / 255 if patches.dtype == torch.uint8 else x) - mean) / std
