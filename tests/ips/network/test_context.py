from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ips.bag import Context
from ips.network.attention import CrossAttention
from ips.network.context import NEGLIGIBLE, each, empty, joined, merged, recalled, summed, without

D, H, T, D_v = 7, 3, 2, 5
J = H * T


def _patches(n: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, J) of embeddings (n, D), and the values' projection, all of which tell heads and tasks apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + torch.arange(D)
    folded = scale * torch.randn(J, D, generator=generator, dtype=torch.float64)
    projection = torch.randn(H, D_v, D, generator=generator, dtype=torch.float64)
    return x @ folded.T, x, projection


def _close(a: Context, b: Context, rtol: float = 1e-11) -> None:
    for name in ("log_mass", "mean", "second"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-11)


def test_sums_are_their_definition() -> None:
    logits, x, projection = _patches(11, 0)
    found = summed(logits, x, projection)
    for h in range(H):
        for t in range(T):
            j = h * T + t
            weights = logits[:, j].exp() / logits[:, j].exp().sum()
            torch.testing.assert_close(found.log_mass[0, j], logits[:, j].exp().sum().log())
            torch.testing.assert_close(found.mean[0, j], sum(w * e for w, e in zip(weights, x, strict=True)))
            outer = sum(w * torch.outer(e, projection[h] @ e) for w, e in zip(weights, x, strict=True))
            assert found.second is not None
            torch.testing.assert_close(found.second[0, j], outer)
    assert summed(logits, x).second is None


def test_float32_has_digits_for_how_patches_differ() -> None:
    """Embeddings far from the origin: what is learned from is a small difference of large products."""
    logits, x, projection = _patches(211, 0, 0.3)
    own = projection.float().double().repeat_interleave(T, dim=0)
    off = (x + 1000).float()
    spreads = []
    for y, of_values in ((off, projection.float()), (off.double(), projection.float().double())):
        found = summed(logits.to(y.dtype), y, of_values)
        assert found.second is not None
        products = torch.einsum("bjd,jvd->bjv", found.mean, own).unsqueeze(2)
        spreads.append(found.second - found.mean.unsqueeze(-1) * products)
    assert (spreads[0] - spreads[1]).abs().max() < 1e-5 * spreads[1].abs().max()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 10**6), st.sampled_from([0.1, 3, 40])
)
def test_parts_add_up_in_any_order_and_come_off_again(n: int, cuts: list[int], seed: int, scale: float) -> None:
    logits, x, projection = _patches(n, seed, scale)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.tensor_split(sorted(min(cut, n) for cut in cuts)) if len(part)]
    whole = empty(J, D, D_v, torch.device("cpu"))
    for part in parts:
        whole = merged(whole, summed(logits[part], x[part], projection))
    _close(whole, summed(logits, x, projection))
    kept = torch.cat(parts[1:]) if len(parts) > 1 else None
    left = without(whole, summed(logits[parts[0]], x[parts[0]], projection))
    if kept is None:
        _close(left, empty(J, D, D_v, torch.device("cpu")))
        return
    expected = summed(logits[kept], x[kept], projection)
    share = (expected.log_mass - whole.log_mass).exp()
    negligible = share < 2 * NEGLIGIBLE
    for a, b in ((left.mean, expected.mean), (left.second, expected.second)):
        assert a is not None
        assert b is not None
        weight = share.view(1, J, *[1] * (a.ndim - 2))
        torch.testing.assert_close(a * weight, b * weight, rtol=0, atol=1e-9)  # what it adds to the pool
    assert (
        ((left.log_mass - expected.log_mass).abs() * share)[~negligible].max().nan_to_num() < 1e-12
        if (~negligible).any()
        else True
    )


def test_nothing_merged_with_nothing_is_nothing() -> None:
    nothing = empty(J, D, D_v, torch.device("cpu"))
    _close(merged(nothing, nothing), nothing)


def test_images_part_and_join() -> None:
    contexts = [summed(*_patches(n, n)) for n in (3, 5)]
    together = joined(contexts)
    assert together.mean.shape == (2, J, D)
    for one, again in zip(contexts, each(together), strict=True):
        _close(one, again, rtol=0)
    plain = joined([summed(*_patches(n, n)[:2]) for n in (3, 5)])
    assert plain.second is None
    assert [one.second for one in each(plain)] == [None, None]


def _attention(seed: int) -> CrossAttention:
    torch.manual_seed(seed)
    return CrossAttention(D, T, H, key_dim=4, value_dim=D_v, dropout=0.0).double()


@pytest.mark.parametrize("winners", [0, 1, 4, 13])
def test_gradients_of_attention_are_those_of_all_patches(winners: int) -> None:
    """gradcheck: the numbers move as the sums do when the weights do, and the expansion says how."""
    attention = _attention(2)
    x = torch.randn(13, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    names = [name for name, _ in attention.named_parameters()]

    def pooled(*weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        with torch.no_grad():
            folded = _called(attention, given, "folded")
            rest = summed((x @ folded.T)[winners:], x[winners:], given["value_proj.weight"].view(H, D_v, D))
        if not winners:
            return _called(attention, given, "recall", rest)
        return _called(attention, given, "forward", x[None, :winners], torch.ones(1, winners, dtype=torch.bool), rest)

    weights = [parameter.detach().clone().requires_grad_() for parameter in attention.parameters()]
    assert torch.autograd.gradcheck(pooled, weights, fast_mode=True)
    full = attention(x[None], torch.ones(1, 13, dtype=torch.bool))
    torch.testing.assert_close(pooled(*weights), full, rtol=1e-12, atol=1e-13)


class _Method(nn.Module):
    """A method of a module as its forward pass, for `functional_call`."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, *args: object) -> Tensor:
        out: Tensor = getattr(self.inner, self.name)(*args)
        return out


def _called(module: nn.Module, weights: dict[str, Tensor], method: str, *args: object) -> Tensor:
    named = {f"inner.{name}": weight for name, weight in weights.items()}
    out: Tensor = torch.func.functional_call(_Method(module, method), named, args)
    return out


def test_without_second_moments_a_context_is_a_constant_of_the_queries() -> None:
    attention = _attention(3)
    x = torch.randn(6, D, dtype=torch.float64)
    rest = summed((x @ attention.folded().T).detach(), x)
    log_mass, values = recalled(rest, attention.folded(), attention.projection())
    assert not log_mass.requires_grad
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert attention.queries.grad is None
    assert attention.value_proj.weight.grad is not None


def test_an_empty_rest_changes_neither_the_pool_nor_a_gradient() -> None:
    attention, x, mask = (
        _attention(4),
        torch.randn(2, 5, D, dtype=torch.float64),
        torch.arange(5) < torch.tensor([[5], [3]]),
    )
    nothing = joined([empty(J, D, D_v, x.device)] * 2)
    grads = []
    for rest in (None, nothing):
        attention.zero_grad()
        out = attention(x, mask, rest)
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in attention.parameters()])
    for plain, with_rest in zip(*grads, strict=True):
        torch.testing.assert_close(plain, with_rest, rtol=1e-13, atol=1e-15)
