from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ips.bag import Bag, Chunk, TensorBag
from ips.network.model import IPSModel
from ips.selection.intake import checked as checked_chunks
from ips.selection.scorer import Scorer
from ips.selection.stream import Stream
from tests.ips.nets import LooseBag, TinyEncoder, bag_of, model_of, resnet_model, tiny_model


def checked(model: IPSModel, bags: Sequence[Bag], size: int) -> Iterator[tuple[int, Chunk]]:
    chunks = ((n, chunk) for n, bag in enumerate(bags) for chunk in bag.chunks(size))
    return checked_chunks(model, chunks, [len(bag) for bag in bags])


def _logits(scorer: Scorer, bags: Sequence[TensorBag | LooseBag], chunk: int) -> tuple[list[Tensor], Stream]:
    stream = Stream(scorer)
    out = [torch.full((len(bag), scorer.width), torch.nan) for bag in bags]
    with scorer.evaluating():
        for number, index, logits in stream.run(checked(scorer.model, bags, chunk)):
            assert logits.shape == (len(index), scorer.width)
            out[number][index] = logits
    return out, stream


def _repetitive(n: int, seed: int) -> TensorBag:
    """Few different patches, a third of them one colour."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.cat((bag_of(8, seed).patches, torch.full((4, 3, 13, 17), 0, dtype=torch.uint8)))
    kinds[9], kinds[10, 1], kinds[11] = 255, 7, 255
    kinds[11, 2, 6, 6] = 254
    return TensorBag(kinds[torch.randint(0, 12, (n,), generator=generator)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 60), st.sampled_from([8, 24, 64]), st.integers(0, 10**6))
def test_folding_duplicates_changes_no_bit(n: int, chunk: int, batch: int, seed: int) -> None:
    bags: list[TensorBag | LooseBag] = [_repetitive(n, seed), bag_of(5, seed)]
    dice = random.Random(seed)
    bags.append(LooseBag(_repetitive(n, seed + 1), torch.randperm(n), lambda: dice.randint(1, 9)))
    model = tiny_model()
    (plain, full), (folded, less) = (_logits(Scorer(model, batch=batch, dedupe=d), bags, chunk) for d in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, folded, strict=True))
    assert not any(a.isnan().any() for a in plain)
    assert full.encoded == 2 * n + 5
    assert less.encoded <= full.encoded


@pytest.mark.parametrize(("dim", "heads"), [(9, 1), (9, 4), (18, 3), (129, 1), (129, 3)])
def test_odd_widths_keep_a_logit_its_own(dim: int, heads: int) -> None:
    """Widths at which MKL's own products do depend on the row (see `ips.selection.scorer`)."""
    torch.manual_seed(0)
    model, bag = model_of(TinyEncoder(dim), dim, heads=heads), bag_of(61)
    straight, _ = _logits(Scorer(model), [bag], 61)
    for seed in range(3):
        order = torch.randperm(61, generator=torch.Generator().manual_seed(seed))
        mixed, _ = _logits(Scorer(model), [LooseBag(bag, order)], 7)
        assert torch.equal(straight[0], mixed[0])


def test_duplicates_are_encoded_once() -> None:
    bag = _repetitive(200, 0)
    different = len({patch.numpy().tobytes() for patch in bag.patches})
    _, stream = _logits(Scorer(tiny_model()), [bag], 200)
    assert stream.encoded == different == 12
    blank = TensorBag(torch.full((300, 3, 13, 17), 7, dtype=torch.uint8))
    _, stream = _logits(Scorer(tiny_model(), batch=8), [blank], 4)
    assert stream.encoded <= 8  # across chunks too, once the first is back from the encoder
    _, stream = _logits(Scorer(tiny_model()), [TensorBag(blank.patches.float() / 255)], 100)
    assert stream.encoded <= 3  # of three chunks


def test_chunks_leave_in_the_order_they_came() -> None:
    model, bags = tiny_model(), [bag_of(10, 1), _repetitive(30, 2), bag_of(3, 3)]
    came = [(number, chunk.index.tolist()) for number, chunk in checked(model, bags, 4)]
    left = [
        (number, index.tolist()) for number, index, _ in Stream(Scorer(model, batch=8)).run(checked(model, bags, 4))
    ]
    assert left == came


def test_several_images_share_encoder_batches() -> None:
    model, sizes = tiny_model(), []
    scorer = Scorer(model, batch=16)
    encode = scorer.content
    scorer.content = lambda patches: (sizes.append(len(patches)), encode(patches))[1]  # type: ignore[func-returns-value, method-assign]
    list(Stream(scorer).run(checked(model, [bag_of(5, n) for n in range(9)], 3)))
    assert sizes == [16, 16, 16]


class _OneBuffer(TensorBag):
    """Fills the same memory for every chunk."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        assert self.positions is not None
        parts = (self.patches[:size].clone(), torch.arange(size), self.positions[:size].clone())
        for chunk in super().chunks(size):
            n = len(chunk.index)
            parts[0][:n], parts[1][:n], parts[2][:n] = chunk.patches, chunk.index, chunk.positions  # type: ignore[assignment]
            yield Chunk(parts[0][:n], parts[1][:n], parts[2][:n])
            for part in parts:
                part.zero_()


@pytest.mark.parametrize("chunk", [3, 8, 20, 61])
@pytest.mark.parametrize("dedupe", [True, False])
def test_a_bag_may_use_its_memory_again(chunk: int, dedupe: bool) -> None:  # noqa: FBT001
    bag = bag_of(61, grid=True)
    scorer = Scorer(tiny_model(grid=True), batch=16, dedupe=dedupe)
    (found,), _ = _logits(scorer, [_OneBuffer(bag.patches, bag.positions)], chunk)
    (expected,), _ = _logits(scorer, [bag], chunk)
    assert torch.equal(found, expected)


def test_an_encoder_may_write_to_its_input() -> None:
    encoder = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(9, 12))
    bag = TensorBag(torch.randn(48, 9))
    before = bag.patches.clone()
    _logits(Scorer(model_of(encoder, 12), batch=16), [bag], 16)
    assert torch.equal(bag.patches, before)


def test_zeros_of_both_signs_are_two_colours() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 0, :1].signbit().float().expand(-1, 12).contiguous()

    model = IPSModel(Signed(), tiny_model().aggregator, {"a": nn.Linear(12, 1), "b": nn.Linear(12, 1)})
    patches = torch.rand(24, 3, 5, 7)
    patches[0], patches[8:] = 0.0, -0.0
    (folded,), _ = _logits(Scorer(model, batch=8), [TensorBag(patches)], 8)
    (plain,), _ = _logits(Scorer(model, batch=8, dedupe=False), [TensorBag(patches)], 8)
    assert torch.equal(folded, plain)
    assert not torch.equal(folded[0], folded[8])


@pytest.mark.parametrize("batch", [8, 64])
def test_logits_are_the_models(batch: int) -> None:
    model, bag = resnet_model(grid=True), bag_of(11, h=37, w=29, grid=True)
    (found,), _ = _logits(Scorer(model, batch=batch), [bag], 4)
    with torch.no_grad():
        model.eval()
        expected = model.logits(model.embed(bag.patches), bag.positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
