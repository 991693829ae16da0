"""The no-gradient pass: an inference copy of the encoder that turns patches into attention logits.

What makes it fast, each of which can be turned off alone: the folded query (`ips.network.attention`), batch norm
fused into the convolutions, channels-last memory, bfloat16, `torch.compile`, equal patches encoded once, pinned
transfers on a side stream, and pixels that travel as they are (uint8: a quarter of the bytes) to be normalised on the
device.

Tried and left out, CPU, Megapixel-MNIST network: ReLU and shortcut inside the convolutions (oneDNN post-ops) and
weights packed beforehand gave 3%; normalisation folded into the first weights would give 0.5% and be wrong at the
border, whose padding is zero after normalisation, not before.

The encoder always sees `batch` patches (the last ones padded), so a logit depends on the patch alone, bit for bit, not
on its neighbours or the chunking. Matrix products need care for that: MKL sums the rows of one product in different
orders where the batch is no multiple of 4 or the inner width is odd (measured: widths 9, 18 and 129 differ in the last
bit; multiples of 16 never did in batches of 8 and more). So the batch is a multiple of 8 and the folded queries are
padded to a multiple of 16; an encoder that ends in matrix products keeps the promise where its widths are such too.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ips.bag import Chunk
from ips.network.aggregator import Aggregator
from ips.network.encoder import resnet_in
from ips.network.model import IPSModel, evaluating, normalised, unwrapped
from ips.network.part import Scores
from ips.network.strided import guarded
from ips.selection.changes import Structure, structure
from ips.selection.fusing import fusable, fuse, is_copied_whole, strip_norms
from ips.selection.transfer import arrived, prepared, to_device

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_STEM_BYTES = 13_000_000
"""Of the first feature maps on a CPU: 8 patches of 224 px in bfloat16. In larger pieces they leave the cache and, above
glibc's 32 MiB, are mapped anew each time; in a larger batch the later stages' weights are repacked less often."""
_PLACES = 128
"""Positions encoded at once: they cost calls, not arithmetic."""


class Scorer:
    """Scores patches with `model` as it is when a selection begins: modules and weights are taken over anew by then.

    A `ResNet` is copied and fused, so its modes and statistics are never touched; other encoders, and one that keeps
    tensors which are neither parameters nor buffers, as the old `weight_norm` does, run in place, in evaluation mode
    and, for bfloat16, under autocast. The caller's autocast does not reach inside.

    Args:
        model: with an `Aggregator`, or another that has `folded`.
        dtype: of the encoder: bfloat16 or the model's own, which None means. Logits have the model's.
        batch: patches the encoder sees at once, a multiple of 8; by default 32 on a CPU, where more only leaves the
            cache, and 256 elsewhere.
        fold: multiply embeddings by the folded queries; without, by the keys' projection, then by the queries.
        fuse: fuse batch norm into the convolutions of a `ResNet`, where neither has hooks or parametrisations.
        channels_last: memory layout of a `ResNet`.
        compile: `torch.compile` with static shapes; pays where one scorer serves many selections.
        dedupe: encode byte-equal patches of a chunk once, and constant ones once a pass.
        side_stream: to CUDA, copy through pinned memory on a stream of its own, behind the encoder's work.
        device_normalise: normalise pixels on the device, after the transfer.

    Raises:
        ValueError: a model without attention logits, another dtype, or `batch`; an encoder whose batch norms keep no
            running statistics, so that a logit would depend on its neighbours.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        batch: int | None = None,
        fold: bool = True,
        fuse: bool = True,
        channels_last: bool = True,
        compile: bool = False,  # noqa: A002, the name of what it turns on
        dedupe: bool = True,
        side_stream: bool = True,
        device_normalise: bool = True,
    ) -> None:
        self.model, self.dedupe, self.fold = unwrapped(model), dedupe, fold
        self.side_stream, self._device_normalise = side_stream, device_normalise
        if not isinstance(self.model.aggregator, Scores):
            raise ValueError(  # noqa: TRY004
                f"model: its {type(self.model.aggregator).__name__} has no attention logits; use Aggregator"
            )
        if batch is not None and (batch < 8 or batch % 8):
            raise ValueError(f"batch={batch} must be a multiple of 8, for logits that depend on their patch alone")
        self._asked, self.asked_batch = dtype, batch
        self._fuse, self._compile = fuse, compile
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._build()

    @torch.inference_mode(mode=False)  # or a copy made in that mode could only be refreshed in it
    def _build(self) -> None:
        """For the modules and tensors that the model has now."""
        self._structure: Structure | None = None  # until it is done: what fails half-way is built again
        model, dtype, batch = self.model, self._asked, self.asked_batch
        check_statistics(model.encoder)
        self.device, self.logit_dtype = model.mean.device, model.mean.dtype
        self.dtype = dtype or self.logit_dtype
        if self.dtype not in (self.logit_dtype, torch.bfloat16):
            raise ValueError(f"dtype={dtype} must be torch.bfloat16 or the model's own, {self.logit_dtype}")
        self.batch = batch or (32 if self.device.type == "cpu" else 256)
        self._pairs: list[tuple[str, str]] = []
        self._encoder = model.encoder
        if resnet_in(model.encoder) is not None and is_copied_whole(model.encoder):
            self._encoder = self._copy(model.encoder)
        self._products = [_pad_width(matrix) for matrix in self._matrices()]
        self.width = len(self._products[-1])
        """J, logits of a patch."""
        self._compiled: Callable[[Tensor], Tensor] | None = None  # not its own method, which would be a circle
        if self._compile:
            self._compiled = torch.compile(self._plain_embed, dynamic=False, fullgraph=True)
        self._structure = self._looked()
        self.refresh()

    def _copy(self, encoder: nn.Module) -> nn.Module:
        """With the weights that `refresh` will overwrite."""
        copied = copy.deepcopy(encoder).requires_grad_(False).eval()
        found = resnet_in(copied)
        if self.device.type == "cpu" and found is not None:
            found[1].stem_bytes = _STEM_BYTES
        if self._fuse:
            self._pairs = fusable(encoder)
            strip_norms(copied, self._pairs)
        for parameter in copied.to(self.dtype).parameters():
            parameter.grad = None  # deepcopy brings gradients along
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._layout)
        return copied

    def follow(self) -> None:
        """Take over the model's modules and weights as they are now, as every `select` does first."""
        if self._looked() != self._structure:
            self._build()
        else:
            self.refresh()

    def _looked(self) -> Structure:
        copied = self._encoder is not self.model.encoder
        return structure((self.model.encoder, self.model.aggregator), settings=copied)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights, in place: nothing is compiled again."""
        encoder = self.model.encoder
        for product, matrix in zip(self._products, self._matrices(), strict=True):
            product.copy_(_pad_width(matrix))
        if self._encoder is encoder:
            return
        fused = {name for pair in self._pairs for name in pair}
        for conv, norm in self._pairs:
            fuse(encoder.get_submodule(conv), encoder.get_submodule(norm), self._encoder.get_submodule(conv))
        for name, module in encoder.named_modules():
            if name not in fused:
                own = self._encoder.get_submodule(name)
                for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    getattr(own, key).copy_(value)

    @torch.no_grad()
    def _matrices(self) -> list[Tensor]:
        """What embeddings are multiplied by, one after the other, to give logits."""
        aggregator = self.model.aggregator
        with self._own_precision():
            if not self.fold and isinstance(aggregator, Aggregator):
                return list(aggregator.attention.unfolded())
            assert isinstance(aggregator, Scores)
            return [aggregator.folded()]

    def _product(self, x: Tensor) -> Tensor:
        """(batch, D) -> (batch, J)."""
        with self._own_precision():
            for matrix in self._products:
                x = nn.functional.linear(_pad_width(x), matrix)
        return x

    def _own_precision(self) -> torch.autocast:
        """Whatever autocast the caller is in."""
        return torch.autocast(self.device.type, enabled=False)

    def receive(self, chunk: Chunk) -> Tensor:
        """Patches (n, ...) of a bag, prepared and on the device."""
        if self._device_normalise:
            return arrived(chunk, self.device, side_stream=self.side_stream)
        patches = prepared(chunk.patches, chunk)
        patches = normalised(patches, self.model.mean.to(patches.device), self.model.std.to(patches.device))
        return to_device(patches, self.device, side_stream=self.side_stream)

    @torch.no_grad()
    def content(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (batch, ...) as `receive` gives them -> (batch, J) logits, and (batch, D), both without positions.

        Raises:
            ValueError: the encoder does not give (batch, D).
        """
        in_place = self._encoder is self.model.encoder
        with torch.autocast(self.device.type, self.dtype, enabled=in_place and self.dtype == torch.bfloat16):
            embeddings = (self._compiled or self._plain_embed)(patches)
        # out of what is compiled; `_pad_width` would make a wrong width fit without a word
        self.model.check_embeddings(embeddings, patches)
        embeddings = embeddings.to(self.logit_dtype)
        return self._product(embeddings), embeddings

    def _plain_embed(self, patches: Tensor) -> Tensor:
        x = self.model.normalise(patches) if self._device_normalise else patches
        if self._encoder is not self.model.encoder:
            x = x.to(dtype=self.dtype, memory_format=self._layout if x.ndim == 4 else torch.contiguous_format)
        with guarded(x):
            embeddings: Tensor = self._encoder(x)
        return embeddings

    @torch.no_grad()
    def place_logits(self, places: Tensor) -> Tensor:
        """The positions' part of the logits: places (n, ...) -> (n, J), in static batches too."""
        position = self.model.position
        assert position is not None
        parts = [
            self._product(position(pad_rows(part, _PLACES)))[: len(part)]
            for part in torch.split(places.to(self.device), _PLACES)
        ]
        return torch.cat(parts)

    def evaluating(self) -> AbstractContextManager[None]:
        """What the passes run in: nothing for a copy, evaluation mode for an encoder used in place."""
        in_place = self._encoder is self.model.encoder
        return evaluating(self._encoder) if in_place else nullcontext()


def kept_scorer(model: IPSModel, dtype: torch.dtype | None, batch: int | None = None) -> Scorer:
    """A `Scorer` that lives as long as its model: an encoder is copied once, not for every selection."""
    key = None if dtype == model.mean.dtype else dtype, batch
    if key not in model.kept:
        alone: Any = weakref.proxy(model)  # or it would be let go only when Python looks for circles
        model.kept[key] = Scorer(alone, dtype=key[0], batch=batch)
    scorer: Scorer = model.kept[key]
    return scorer


def check_statistics(encoder: nn.Module) -> None:
    """Refuse batch norms that use the statistics of the batch even in evaluation mode, by ValueError."""
    for name, module in encoder.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise ValueError(
                f"encoder: {name or 'it'} is a {type(module).__name__} without running statistics, which makes an "
                "embedding depend on its batch; build it with track_running_stats=True"
            )


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat the first row of x (n, ...) until there are `rows`."""
    return x if len(x) == rows else torch.cat((x, x[:1].expand(rows - len(x), *x.shape[1:])))


def _pad_width(x: Tensor) -> Tensor:
    """Add zeros to x (n, D) up to a width that is a multiple of 16."""
    return nn.functional.pad(x, (0, -x.shape[1] % 16))
