"""The network: encoder, optional positions, aggregator, heads. Composition only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ips.aggregator import Aggregator
from ips.bag import Batch
from ips.positions import IndexPositions


class IPSModel(nn.Module):
    """Patches of an image -> logits of every task (paper section 3).

    Args:
        encoder: (n, C, h, w) or (n, F) -> (n, D).
        aggregator: `Aggregator`, or one of `ips.baselines` with the same `forward` and `tasks`.
        heads: task -> head (B, D) -> (B, K); the i-th head reads the i-th token.
        position: `GridPositions`, `IndexPositions` or None; added to embeddings after the encoder.
        mean: per channel, of pixels scaled to 0..1. Features are never normalised.
        std: per channel.

    Raises:
        ValueError: as many heads as the aggregator has tasks are needed; `mean` and `std` differ in length.
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
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} need equal lengths and std > 0")
        self.encoder, self.aggregator, self.position = encoder, aggregator, position
        self.tasks = tuple(heads)
        self.heads = nn.ModuleList(heads.values())  # a list: task names may hold dots, module names may not
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, patches: Tensor) -> Tensor:
        """Pixels (n, C, h, w), uint8 or float in 0..1 -> (x - mean) / std in the model's dtype. Features pass."""
        return normalised(patches, self.mean, self.std)

    def embed(self, patches: Tensor) -> Tensor:
        """(n, C, h, w) or (n, F), on the model's device -> (n, D), without positions."""
        embeddings: Tensor = self.encoder(self.normalise(patches))
        return embeddings

    def places(self, index: Tensor, positions: Tensor | None) -> Tensor | None:
        """What the position encoding reads: the index, the grid positions, or nothing.

        Raises:
            ValueError: the model encodes grid positions and the bag has none.
        """
        if self.position is None:
            return None
        if isinstance(self.position, IndexPositions):
            return index
        if positions is None:
            raise ValueError("positions: the model encodes grid positions, but the bag gives none; add them to it")
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
        """
        B, M = mask.shape
        padded = embeddings.new_zeros(B * M, embeddings.shape[-1])
        embeddings = padded.index_copy(0, mask.flatten().nonzero().squeeze(1), embeddings).view(B, M, -1)
        if self.position is not None and places is not None:
            embeddings = embeddings + self.position(places)
        tokens = self.aggregator(embeddings, mask)
        return {task: head(tokens[:, i]) for i, (task, head) in enumerate(zip(self.tasks, self.heads, strict=True))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Winners -> task -> logits (B, K). Masked places are never encoded, so they touch no batch statistics."""
        embeddings = self.embed(batch.patches[batch.mask])
        return self.pool(embeddings, batch.mask, self.places(batch.index, batch.positions))


def normalised(patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`IPSModel.normalise` with mean and std (C, 1, 1) at hand; the result has their dtype."""
    x = patches.to(mean.dtype)
    if patches.ndim == 2:
        return x
    return ((x / 255 if patches.dtype == torch.uint8 else x) - mean) / std
