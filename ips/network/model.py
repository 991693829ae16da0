"""The network: encoder, optional positions, aggregator, heads. Composition only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from ips.bag import Batch, Context, check_mask
from ips.network.aggregator import Aggregator
from ips.network.heads import Heads, Kind
from ips.network.part import Part, PatchEncoder, Positions, Scores, can_be_read
from ips.network.positions import check_positions
from ips.network.strided import guarded


class IPSModel(nn.Module):
    """Patches of an image -> logits of every task (paper section 3).

    Args:
        encoder: (n, C, h, w) or (n, F) -> (n, D). Where it is a `PatchEncoder`, what it says of itself is held to;
            of other modules no attribute is read.
        aggregator: `Aggregator`, or another with its `forward` and `tasks`; with its `folded` it can select, too.
        heads: task -> head (B, D) -> (B, K), `linear_head` or another; the i-th head reads the i-th token.
        position: `GridPositions`, `IndexPositions`, other `Positions` or None; added to embeddings after the encoder.
        mean: per channel, of pixels scaled to 0..1. Features are never normalised.
        std: per channel.

    Raises:
        ValueError: as many heads as the aggregator has tasks are needed; encoder, aggregator, position and heads are
            of different widths; `mean` and `std` differ in length; a part is wrapped for several processes.
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
        parts = {"encoder": encoder, "aggregator": aggregator, "position": position}
        for name, part in parts.items():
            if isinstance(part, DistributedDataParallel | DataParallel):
                raise ValueError(  # noqa: TRY004
                    f"{name} is a {type(part).__name__}, whose every call waits for the other processes, while each "
                    "has its own patches; wrap the whole model instead"
                )
        if (tokens := getattr(aggregator, "tasks", None)) != len(heads):
            raise ValueError(f"heads has {len(heads)} tasks {list(heads)}, the aggregator {tokens} tokens")
        widths: dict[str, Any] = {name: part.dim for name, part in parts.items() if isinstance(part, Part)}
        for task, head in heads.items():
            if isinstance(head, nn.Linear) and head.in_features:  # a lazy layer says 0 until it is used
                widths[f"heads[{task!r}]"] = head.in_features
        if len(set(widths.values())) > 1:
            raise ValueError(f"encoder, aggregator, position and heads need one width D, found {widths}")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} need equal lengths and std > 0")
        self.dim: int | None = next(iter(widths.values()), None)
        """D, where a part says it."""
        self.encoder, self.aggregator, self.position = encoder, aggregator, position
        self.heads = Heads(heads)
        self.kept: dict[Any, Any] = {}
        """What is kept for as long as the model lives, as a copy for the selection is; of this one, so never copied."""
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept": {}}  # type: ignore[no-untyped-call]

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of their tokens."""
        return self.heads.tasks

    @property
    def kinds(self) -> dict[str, Kind]:
        """Task -> kind, of the heads that say it: for `task_loss`."""
        return self.heads.kinds

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of an earlier version with the names of this one.

        It does not hold the tasks' names, how heads divide the projections, nor which positions are encoded: use it
        only where you know that all of these are the model's.
        """
        ours = {name: x for name, x in self.state_dict().items() if name.startswith(("aggregator.", "position."))}
        said = {name: x for name, x in ours.items() if not is_lazy(x) and not x.numel()}
        return {**({} if said.keys() & state.keys() else said), **self.heads.named(state)}

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
        width = channels = None
        if isinstance(self.encoder, PatchEncoder):
            width, channels = self.encoder.inputs, self.encoder.channels
        if width is not None and patches.shape[1:] != (width,):
            raise ValueError(f"{found}; the encoder needs features (n, {width})")
        if patches.ndim == 2 and channels is not None:
            raise ValueError(f"{found}; the encoder needs pixels, (n, {channels}, h, w)")
        channels = channels or patches.shape[1]
        if patches.ndim == 4 and (patches.shape[1] != channels or len(self.mean) not in (1, channels)):
            raise ValueError(f"{found}; the encoder needs {channels} channels, mean and std give {len(self.mean)}")

    def embed(self, patches: Tensor) -> Tensor:
        """(n, C, h, w) or (n, F), on the model's device -> (n, D), without positions.

        Raises:
            ValueError: where `check_patches` or `check_embeddings` raises it.
        """
        self.check_patches(patches)
        embeddings = self.encode(self.normalise(patches))
        self.check_embeddings(embeddings, patches)
        return embeddings

    def encode(self, x: Tensor) -> Tensor:
        """Normalised patches -> what the encoder makes of them, unchecked."""
        with guarded(x):
            out: Tensor = self.encoder(x)
        return out

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
            ValueError: the model encodes grid positions, and the bag has none or has some that are out of range
                (values are not looked at in a graph that is recorded; `select` has seen them).
        """
        if self.position is None:
            return None
        if isinstance(self.position, Positions) and self.position.reads_index:
            return index
        if positions is None:
            raise ValueError("positions: the model encodes grid positions, but the bag gives none; add them to it")
        if not torch.compiler.is_compiling():
            check_positions(positions, self.position_limit, "positions")
        return positions

    @property
    def position_limit(self) -> float:
        """Grid positions from there on are refused."""
        return self.position.limit if isinstance(self.position, Positions) else Positions.limit

    def logits(self, embeddings: Tensor, places: Tensor | None) -> Tensor:
        """Attention logits of embeddings (n, D) at `places` (see `places`) -> (n, J), J = H*T."""
        if self.position is not None and places is not None:
            embeddings = embeddings + self.position(places)
        aggregator = self.aggregator
        if not isinstance(aggregator, Scores):
            raise ValueError(f"aggregator: {type(aggregator).__name__} has no attention logits; use Aggregator")  # noqa: TRY004
        return nn.functional.linear(embeddings, aggregator.folded())

    def pool(
        self,
        embeddings: Tensor,
        mask: Tensor,
        places: Tensor | None,
        real: Tensor | None = None,
        rest: Context | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embeddings (n, D) of the real winners, in the order of mask (B, M) -> task -> logits (B, K).

        `places` (B, M, ...) is what `places` gives; `real` (n,) is `Batch.real`, which without it is read off the mask,
        and a device waited for. Masked embeddings become zeros and are never attended to; the patches of `rest` are,
        without being here. The gradient of each embedding is multiplied by `weights` (B, M).

        Raises:
            ValueError: on a CPU, an image of which nothing is unmasked; `rest` where `pooling` raises it.
        """
        B, M = mask.shape
        if can_be_read(mask):
            check_mask(mask)
        real = mask.flatten().nonzero().squeeze(1) if real is None else real
        padded = embeddings.new_zeros(B * M, embeddings.shape[-1])
        embeddings = padded.index_copy(0, real, embeddings).view(B, M, -1)
        if self.position is not None and places is not None:
            embeddings = embeddings + self.position(places)
        if weights is not None:
            as_it_is = embeddings.detach()  # to the last bit, whatever the weight
            embeddings = as_it_is + weights.to(embeddings.dtype).unsqueeze(-1) * (embeddings - as_it_is)
        tokens = self.aggregator(embeddings, mask) if rest is None else self.pooling(embeddings, mask, rest)
        outputs: dict[str, Tensor] = self.heads(tokens)
        return outputs

    def recall(self, whole: Context) -> dict[str, Tensor]:
        """What the model says of images by the context of all their patches -> task -> logits (B, K).

        Raises:
            ValueError: where `pooling` raises it.
        """
        outputs: dict[str, Tensor] = self.heads(self.pooling.recall(whole))
        return outputs

    @property
    def pooling(self) -> Aggregator:
        """The aggregator that knows contexts; ValueError where it is another, or one that pools in a way of its own."""
        kind = type(self.aggregator)
        own = any(getattr(kind, name, None) is not getattr(Aggregator, name) for name in ("forward", "folded"))
        if not isinstance(self.aggregator, Aggregator) or own:
            raise ValueError(
                f"aggregator: {type(self.aggregator).__name__} cannot pool patches that it does not see; context needs "
                "Aggregator"
            )
        return self.aggregator

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Winners -> task -> logits (B, K). Masked places are never encoded, so they touch no batch statistics.

        Raises:
            TypeError: something else than a `Batch`.
            ValueError: where `places` and `embed` raise it.
        """
        if not isinstance(batch, Batch):
            raise TypeError(
                f"batch is a {type(batch).__name__}; a model reads what `gather(bags, select(model, bags, memory, "
                "chunk), device)` gives. Patches of one image are a bag: TensorBag(patches)"
            )
        places = self.places(batch.index, batch.positions)  # checked before a device has work to be waited for
        patches = batch.patches.flatten(0, 1).index_select(0, batch.real)
        return self.pool(self.embed(patches), batch.mask, places, batch.real, batch.rest, batch.weights)


def layers(model: nn.Module) -> list[nn.Module]:
    """A model and what it wraps, outermost first, an `IPSModel` last: DDP, an average of weights, `torch.compile`.

    Raises:
        ValueError: it wraps no `IPSModel`, or in a way that leaves this process a part of the weights.
    """
    found = [model]
    while not isinstance(found[-1], IPSModel):
        wraps = isinstance(found[-1], DistributedDataParallel | DataParallel | AveragedModel)
        inner = found[-1].module if wraps else getattr(found[-1], "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(  # noqa: TRY004
                f"model is a {type(found[-1]).__name__}; needs an IPSModel with all its weights, or one in "
                "DistributedDataParallel, AveragedModel or torch.compile"
            )
        found.append(inner)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):  # DTensor loads for a second
        raise ValueError(
            "model: this process holds a part of its weights (fully_shard), and selects with all; use "
            "DistributedDataParallel, or average_gradients"
        )
    return found


def unwrapped(model: nn.Module) -> IPSModel:
    """The `IPSModel` in `layers(model)`."""
    inner = layers(model)[-1]
    assert isinstance(inner, IPSModel)
    return inner


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode again after, also when the body raises."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def normalised(patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`IPSModel.normalise` with mean and std (C, 1, 1) at hand; the result has their dtype."""
    x = patches.to(mean.dtype)
    if patches.ndim == 2:
        return x
    return ((x / 255 if patches.dtype == torch.uint8 else x) - mean) / std
