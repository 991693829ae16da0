from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ips.bag import Chunk, TensorBag
from ips.selection.certify import certified
from ips.selection.pools import LogitCache
from ips.selection.scorer import Scorer
from ips.selection.select import select
from tests.ips.nets import bag_of, resnet_model, tiny_model


def test_a_noisy_selection_is_repaired() -> None:
    """Logits with noise of known size: the second scoring brings the float32 winners back."""
    model, bag = tiny_model(scale=3.0), bag_of(800)
    rows = select(model, [bag], 20, 50).index[0]
    reference = Scorer(model)
    exact, noisy = LogitCache(800, reference.width), LogitCache(800, reference.width)
    model.eval()
    with torch.no_grad():
        exact.logits[:] = model.logits(model.embed(bag.patches), None)
    noise = torch.empty(800, 1).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))
    noisy.logits[:] = exact.logits + noise
    assert sorted(noisy.winners(20)[0].tolist()) != sorted(rows.tolist())
    before = set(noisy.winners(20)[0].tolist())
    certificate = certified(noisy, [bag], 0, 20, 64, reference)
    found, _ = noisy.winners(20)
    assert sorted(found.tolist()) == sorted(rows.tolist())
    assert certificate.changed == len(set(found.tolist()) - before) > 0
    assert 0.04 < certificate.error <= 0.051
    assert 20 < certificate.band < 800


class _Counting(TensorBag):
    def __init__(self, patches: Tensor) -> None:
        super().__init__(patches)
        self.taken: list[int] = []

    def take(self, rows: Tensor) -> Chunk:
        self.taken.append(len(rows))
        return super().take(rows)


def test_select_certifies_bfloat16_and_reads_only_the_band() -> None:
    model = resnet_model(scale=5.0)
    bag = _Counting(bag_of(300, h=19, w=23).patches)
    found = select(model, [bag], 10, 32, dtype=torch.bfloat16, certify=True)
    assert found.certificates is not None
    (certificate,) = found.certificates
    assert sum(bag.taken) == 256 + certificate.band
    assert max(bag.taken) <= 32
    exact = select(model, [bag], 10, 32)
    assert set(found.index[0].tolist()) == set(exact.index[0].tolist())
    assert select(model, [bag], 10, 32, dtype=torch.bfloat16).certificates is None


def test_the_attention_is_that_of_the_winners() -> None:
    """More patches than the sample, so that some keep their bfloat16 logits."""
    model, bag = tiny_model(scale=30.0), bag_of(700)
    found = select(model, [bag], 20, 64, dtype=torch.bfloat16, certify=True, attention=True)
    assert found.attention is not None
    (attention,), (rows,) = found.attention, found.index
    assert torch.equal(attention[rows], found.scores[0])
    assert set(attention.topk(20).indices.tolist()) == set(rows.tolist())
    assert float(attention.double().sum()) == pytest.approx(1, abs=1e-6)
    each = select(model, [bag], 20, 64, dtype=torch.bfloat16, certify=True, attention="each").attention
    assert each is not None
    torch.testing.assert_close(each[0].mean(dim=(1, 2)), attention)


class _Slips(TensorBag):
    """Gives all rows in `chunks`, and something else in `take`."""

    def __init__(self, patches: Tensor, slip: Callable[[Chunk], Chunk]) -> None:
        super().__init__(patches)
        self._slip = slip

    def take(self, rows: Tensor) -> Chunk:
        return self._slip(super().take(rows))


@pytest.mark.filterwarnings("ignore:float pixels above 1.5")  # those of 3e38
@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (lambda c: Chunk(c.patches[1:], c.index[1:]), r"bags\[1\].take gave \d patches for \d rows"),
        (lambda c: Chunk(c.patches.flip(0), c.index.flip(0)), r"bags\[1\].take gave row 6 where row 0 was asked for"),
        (lambda c: Chunk(c.patches * torch.nan, c.index), r"bags\[1\]: patches: row 0 holds NaN"),
        (lambda c: Chunk(c.patches * 3e38, c.index), r"bags\[1\]: the logits of row 0 are NaN or infinite"),
        (lambda c: Chunk(c.patches[:, :1], c.index), r"bags\[1\]: patches has shape \(7, 1, 13, 17\)"),
    ],
)
def test_what_the_second_scoring_takes_is_checked(slip: Callable[[Chunk], Chunk], message: str) -> None:
    patches = bag_of(23).patches / 255
    bags = [TensorBag(patches), _Slips(patches, slip)]
    with pytest.raises(ValueError, match=message):
        select(tiny_model(), bags, 3, 7, dtype=torch.bfloat16, certify=True)


def test_a_group_certifies_too(group_of_one: dist.ProcessGroup) -> None:
    model, bags = tiny_model(grid=True), [bag_of(n, n, grid=True) for n in (41, 3)]
    shared, alone = (
        select(model, bags, 5, 7, dtype=torch.bfloat16, certify=True, group=group) for group in (group_of_one, None)
    )
    assert torch.equal(shared.index, alone.index)
    assert torch.equal(shared.scores, alone.scores)
    assert shared.certificates == alone.certificates
    assert torch.equal(shared.index, select(model, bags, 5, 7).index)


def test_only_where_there_is_doubt() -> None:
    with pytest.raises(ValueError, match="certify=True needs a bfloat16 selection"):
        select(tiny_model(), [bag_of(3)], 2, 3, certify=True)
    for dtype in (torch.bfloat16, torch.float16):
        short = tiny_model().to(dtype)
        with pytest.raises(ValueError, match=f"certify=True scores again with the model, which is in {dtype}"):
            select(short, [bag_of(3)], 2, 3, dtype=torch.bfloat16, certify=True)
    with pytest.raises(ValueError, match="mode='window': certify, group and draw need mode='exact'"):
        select(tiny_model(), [bag_of(3)], 2, 3, "window", dtype=torch.bfloat16, certify=True)
