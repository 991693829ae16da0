"""The no-gradient pass: an inference copy of the encoder that turns patches into attention logits.

What makes it fast, each of which can be turned off alone: the folded query (`ips.attention`), batch norm fused into the
convolutions, channels-last memory, bfloat16, `torch.compile`, equal patches encoded once.

The encoder always sees `batch` patches (the last ones padded), so a logit depends on the patch alone, bit for bit, not
on its neighbours or the chunking. Matrix products need care for that: MKL sums the rows of one product in different
orders where the batch is no multiple of 4 or the inner width is odd (measured: widths 9, 18 and 129 differ in the last
bit; multiples of 16 never did in batches of 8 and more). So the batch is a multiple of 8 and the folded queries are
padded to a multiple of 16; an encoder that ends in matrix products keeps the promise where its widths are such too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ips.aggregator import Aggregator
from ips.encoder import ResNet
from ips.model import IPSModel


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


class Scorer:
    """Scores patches with `model` as it is at the last `refresh`.

    A `ResNet` is copied and fused, so its modes and statistics are never touched; other encoders run in place, in
    evaluation mode and, for bfloat16, under autocast.

    Args:
        model: with an `Aggregator`.
        dtype: float32 or bfloat16, of the encoder; logits are float32.
        batch: patches the encoder sees at once, a multiple of 8; by default 32 on a CPU, where more only leaves the
            cache, and 256 elsewhere.
        fuse: fuse batch norm into the convolutions of a `ResNet`.
        channels_last: memory layout of a `ResNet`.
        compile: `torch.compile` with static shapes; pays where one scorer serves many selections.
        dedupe: encode byte-equal patches of a chunk once, and constant ones once a pass.

    Raises:
        ValueError: a model without attention logits, another dtype, or `batch`.
    """

    def __init__(
        self,
        model: IPSModel,
        *,
        dtype: torch.dtype = torch.float32,
        batch: int | None = None,
        fuse: bool = True,
        channels_last: bool = True,
        compile: bool = False,  # noqa: A002, the name of what it turns on
        dedupe: bool = True,
    ) -> None:
        if not isinstance(model.aggregator, Aggregator):
            raise ValueError(f"model: its {type(model.aggregator).__name__} has no attention logits; use Aggregator")  # noqa: TRY004
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype} must be torch.float32 or torch.bfloat16")
        self.device = model.mean.device
        if batch is None:
            batch = 32 if self.device.type == "cpu" else 256
        if batch < 8 or batch % 8:
            raise ValueError(f"batch={batch} must be a multiple of 8, for logits that depend on their patch alone")
        self.model, self.dtype, self.batch, self.dedupe = model, dtype, batch, dedupe
        self._pairs: list[tuple[str, str]] = []
        self._encoder = model.encoder
        self._layout = torch.contiguous_format
        if isinstance(model.encoder, ResNet):
            self._encoder = copy.deepcopy(model.encoder).requires_grad_(False).eval()
            if fuse:
                self._pairs = list(model.encoder.conv_norm_pairs())
                _strip_norms(self._encoder, self._pairs)
            if channels_last:
                self._layout = torch.channels_last
            for parameter in self._encoder.to(dtype).parameters():
                parameter.grad = None  # deepcopy brings gradients along
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=self._layout)
        self.width = len(model.aggregator.folded())
        """J, logits of a patch."""
        self._queries = _pad_width(torch.zeros_like(model.aggregator.folded(), requires_grad=False))
        self._embed: Callable[[Tensor], Tensor] = (
            torch.compile(self._plain_embed, dynamic=False, fullgraph=True) if compile else self._plain_embed
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights, in place: nothing is compiled again."""
        aggregator, encoder = self.model.aggregator, self.model.encoder
        assert isinstance(aggregator, Aggregator)
        self._queries.copy_(_pad_width(aggregator.folded()))
        if self._encoder is encoder:
            return
        fused = {name for pair in self._pairs for name in pair}
        for conv, norm in self._pairs:
            _fuse(encoder.get_submodule(conv), encoder.get_submodule(norm), self._encoder.get_submodule(conv))
        for name, module in encoder.named_modules():
            if name not in fused:
                own = self._encoder.get_submodule(name)
                for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    getattr(own, key).copy_(value)

    @torch.no_grad()
    def content_logits(self, patches: Tensor) -> Tensor:
        """Logits of patches (batch, ...) on the device, without the positions' part -> (batch, J) float32."""
        in_place = self._encoder is self.model.encoder
        with torch.autocast(self.device.type, self.dtype, enabled=in_place and self.dtype != torch.float32):
            embeddings = self._embed(patches)
        return nn.functional.linear(_pad_width(embeddings.float()), self._queries)

    def _plain_embed(self, patches: Tensor) -> Tensor:
        x = self.model.normalise(patches)
        if self._encoder is not self.model.encoder:
            x = x.to(dtype=self.dtype, memory_format=self._layout)
        embeddings: Tensor = self._encoder(x)
        return embeddings

    @torch.no_grad()
    def place_logits(self, places: Tensor) -> Tensor:
        """The positions' part of the logits: places (n, ...) -> (n, J) float32, in static batches too."""
        position = self.model.position
        assert position is not None
        parts = [
            nn.functional.linear(_pad_width(position(pad_rows(part, self.batch))), self._queries)[: len(part)]
            for part in torch.split(places.to(self.device), self.batch)
        ]
        return torch.cat(parts)

    def evaluating(self) -> AbstractContextManager[None]:
        """What the passes run in: nothing for a copy, evaluation mode for an encoder used in place."""
        in_place = self._encoder is self.model.encoder
        return evaluating(self._encoder) if in_place else nullcontext()


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat the first row of x (n, ...) until there are `rows`."""
    return x if len(x) == rows else torch.cat((x, x[:1].expand(rows - len(x), *x.shape[1:])))


def _pad_width(x: Tensor) -> Tensor:
    """Add zeros to x (n, D) up to a width that is a multiple of 16."""
    return nn.functional.pad(x, (0, -x.shape[1] % 16))


def _strip_norms(encoder: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Give each convolution a bias and make its batch norm an identity."""
    for conv_name, norm_name in pairs:
        conv = encoder.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(encoder.get_submodule(parent), leaf, nn.Identity())


def _fuse(conv: nn.Module, norm: nn.Module, fused: nn.Module) -> None:
    """Write norm(conv(x)), at the norm's running statistics, into `fused`: w * g and b - mean * g, g = w_n / std."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(fused, nn.Conv2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert fused.bias is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    fused.weight.copy_(conv.weight.double() * gain.view(-1, 1, 1, 1))
    fused.bias.copy_(norm.bias.double() - norm.running_mean.double() * gain)
