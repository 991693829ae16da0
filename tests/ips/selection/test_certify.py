from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ips.bag import Chunk, TensorBag
from ips.network.attention import CrossAttention
from ips.network.model import IPSModel
from ips.selection import certify
from ips.selection.certify import certified
from ips.selection.pools import LogitCache
from ips.selection.scorer import Scorer
from ips.selection.select import select
from tests.ips.nets import bag_of, model_of, resnet_model, tiny_model
from tests.oracle import taken_in_turns


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


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 40), st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_what_heads_take_in_turn_is_repaired(
    monkeypatch: pytest.MonkeyPatch, N: int, J: int, memory: int, seed: int
) -> None:
    """Every logit is wrong by as much as on the sample; who takes first decides what is left for the next one."""
    monkeypatch.setattr(certify, "SAMPLE", 2)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, J, generator=generator, dtype=torch.float64)
    model, bag = _told(logits)
    noisy = LogitCache(N, J, torch.float64, rank="heads")
    noisy.logits[:] = logits + 0.3 * torch.randn(N, J, generator=generator).sign()
    certificate = certified(noisy, [bag], 0, memory, 7, Scorer(model))
    assert set(noisy.winners(memory)[0].tolist()) == set(taken_in_turns(logits.tolist(), memory))
    assert certificate.error == pytest.approx(0.3)
    assert sum(bag.taken) == 2 + certificate.band
    assert certificate.band >= min(N, memory)


def test_what_another_head_leaves_may_be_in_doubt_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the first head takes row 1 and not row 0, the second takes row 2 or 3, on which it had no eye before."""
    monkeypatch.setattr(certify, "SAMPLE", 1)
    logits = torch.tensor([[1.0, -5.0], [1.1, 5.0], [-5.0, 0.0], [-5.0, -0.1], [-5.0, -9.0]], dtype=torch.float64)
    model, bag = _told(logits)
    noisy = LogitCache(5, 2, torch.float64, rank="heads")
    noisy.logits[:] = logits + 0.3 * torch.tensor([[1, 1], [-1, 1], [1, -1], [1, 1], [1, 1]])
    assert sorted(noisy.winners(2)[0].tolist()) == [0, 1]
    assert certified(noisy, [bag], 0, 2, 7, Scorer(model)).band == 4
    assert sorted(noisy.winners(2)[0].tolist()) == [1, 2]


def test_a_loud_head_puts_no_more_of_the_others_in_doubt() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 4, generator=generator, dtype=torch.float64)
    noise = 0.01 * torch.randn(600, 4, generator=generator).sign()

    def band(loud: float) -> int:
        scale = torch.tensor([1.0, 1.0, 1.0, loud])
        model, bag = _told(logits * scale)
        noisy = LogitCache(600, 4, torch.float64, rank="heads")
        noisy.logits[:] = (logits + noise) * scale
        found = certified(noisy, [bag], 0, 16, 64, Scorer(model))
        assert set(noisy.winners(16)[0].tolist()) == set(taken_in_turns((logits * scale).tolist(), 16))
        return found.band

    assert band(100.0) == band(1.0) < 60


def _told(logits: Tensor) -> tuple[IPSModel, _Counting]:
    """A model, and patches that have logits (N, J) of it."""
    torch.manual_seed(0)
    J = logits.shape[1]
    model = model_of(nn.Identity(), J, tasks=1, heads=J).double()
    attention = model.aggregator.get_submodule("attention")
    assert isinstance(attention, CrossAttention)
    with torch.no_grad():
        return model, _Counting(torch.linalg.solve(attention.folded(), logits.t()).t().contiguous())


def test_of_many_patches_few_are_in_doubt() -> None:
    model, bag = resnet_model(scale=5.0), _Counting(bag_of(300, h=19, w=23).patches)
    found = select(model, [bag], 10, 32, dtype=torch.bfloat16, certify=True, rank="heads")
    assert found.certificates is not None
    assert 10 <= found.certificates[0].band < 150
    assert set(found.index[0].tolist()) == set(select(model, [bag], 10, 32, rank="heads").index[0].tolist())


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
