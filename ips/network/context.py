"""All patches in the pool, in numbers that do not grow with them: sums of an online softmax.

The pool of head and task j is V_j sum_n a_nj x_n with a = softmax over patches of l_nj = A_j . x_n. Any set of patches
enters it through its mass sum_n exp(l_nj) and its weighted mean, which add up over chunks and processes in any order;
so winners, with gradient, and the rest of the image, as a `Context`, give the pool over all N.

The rest depends on A and V too. To first order around the weights that it was made with,

    d log_mass_j = mean_j . dA_j        d(V_j mean_j) = dV_j mean_j + Cov_j(V_j x, x) dA_j

and `recalled` is that expansion: its values are the sums, its gradient that of the pool over all N.

Masses and means are float64 throughout, or those of all patches less those of the winners would be rounding where the
winners have nearly all the mass; a gradient of the rest weighs no more than its mass. A rest below `NEGLIGIBLE` of it
counts as none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ips.bag import Context

NEGLIGIBLE = 1e-12
"""Of the mass: 4 digits above the rounding of float64, 5 below that of float32."""


def summed(logits: Tensor, x: Tensor, projection: Tensor | None = None) -> Context:
    """The context of one image's patches: logits (n, J) and embeddings with positions (n, D) -> B = 1.

    `projection` (H, D_v, D), the values', adds what learning needs.
    """
    logits, exact = logits.double(), x.double()
    log_mass = logits.logsumexp(dim=0)
    weights = (logits - log_mass).exp()
    mean = weights.T @ exact
    second = None if projection is None else _second(weights, exact, mean, projection, x.dtype).unsqueeze(0)
    return Context(log_mass[None], mean[None], second)


def _second(weights: Tensor, x: Tensor, mean: Tensor, projection: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_n a_nj x_n (V_j x_n)^T of weights a (n, J), embeddings (n, D) and their means (J, D) -> (J, D, D_v).

    The two products over patches are in `dtype`, float32 at least: only the gradient is made of them. They are of the
    embeddings' distances from their middle, so that its digits are left for what is learned from, how patches differ.
    """
    H, D_v, D = projection.shape
    J, dtype = len(mean), torch.promote_types(dtype, torch.float32)
    middle = x.sum(dim=0) / max(1, len(x))
    off = (x - middle).to(dtype)
    values = (off @ projection.to(dtype).flatten(0, 1).T).view(-1, H, 1, D_v)
    weighted = weights.to(dtype).view(-1, H, J // H, 1) * values  # (n, H, T, D_v)
    spread = (off.T @ weighted.flatten(1)).view(D, J, D_v).transpose(0, 1).double()
    own = projection.double().repeat_interleave(J // H, dim=0)  # (J, D_v, D)
    of_mean = torch.einsum("jd,jvd->jv", mean, own).unsqueeze(1)
    of_middle = (own @ middle).unsqueeze(1)
    return spread + middle.unsqueeze(1) * of_mean + (mean - middle).unsqueeze(2) * of_middle


def empty(J: int, D: int, D_v: int | None, device: torch.device) -> Context:
    """The context of no patches, B = 1; D_v where it is for learning."""
    log_mass = torch.full((1, J), -torch.inf, dtype=torch.float64, device=device)
    return Context(log_mass, log_mass.new_zeros(1, J, D), None if D_v is None else log_mass.new_zeros(1, J, D, D_v))


def merged(a: Context, b: Context) -> Context:
    """Of the patches of both, which share none."""
    log_mass = torch.logaddexp(a.log_mass, b.log_mass)
    of_a, of_b = ((part.log_mass - log_mass).exp().nan_to_num() for part in (a, b))  # NaN: neither has patches
    return _weighed(log_mass, of_a, a, of_b, b)


def without(whole: Context, part: Context) -> Context:
    """Of the patches of `whole` that are not in `part`, whose sums are those that went into `whole`."""
    share = -torch.expm1(part.log_mass - whole.log_mass)  # that stays
    some = share > NEGLIGIBLE
    share = share.where(some, 1.0)
    log_mass = (whole.log_mass + share.log()).where(some, -torch.inf)
    return _weighed(log_mass, some / share, whole, -(1 - share) * some / share, part)


def recalled(context: Context, folded: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """What the aggregator reads of a context: its log mass (B, J), and its values (B, J, D_v).

    They have the dtype of the weights, `folded` (J, D) and `projection` (H, D_v, D), which must be those that the
    context was made with. The gradient reaches these weights from all of its patches where `context` has `second`; else
    it is a constant but for the projection.
    """
    own = projection.repeat_interleave(len(folded) // len(projection), dim=0)  # (J, D_v, D), row h * T + t
    log_mass, mean = context.log_mass.to(folded.dtype), context.mean.to(folded.dtype)
    values = torch.einsum("bjd,jvd->bjv", mean, own)
    if context.second is not None and torch.is_grad_enabled():
        exact = torch.einsum("bjd,jvd->bjv", context.mean, own.detach().double())
        spread = (context.second - context.mean.unsqueeze(-1) * exact.unsqueeze(2)).to(folded.dtype)
        step = folded - folded.detach()  # zero, with a gradient
        log_mass = log_mass + torch.einsum("bjd,jd->bj", mean, step)
        values = values + torch.einsum("bjdv,jd->bjv", spread, step)
    return log_mass, values


def each(context: Context) -> list[Context]:
    """Of B images -> B of one."""
    parts = zip(*(torch.split(x, 1) for x in tensors(context)), strict=True)
    return [Context(*part) for part in parts]


def joined(parts: Sequence[Context]) -> Context:
    """The images of all, one after another."""
    return Context(*map(torch.cat, zip(*map(tensors, parts), strict=True)))


def tensors(context: Context) -> list[Tensor]:
    """Those that it holds, in the order of its fields."""
    return [x for x in (context.log_mass, context.mean, context.second) if x is not None]


def _weighed(log_mass: Tensor, of_a: Tensor, a: Context, of_b: Tensor, b: Context) -> Context:
    """Means (B, J, ...) of two contexts, weighed by (B, J)."""
    means = []
    for x, y in zip(tensors(a)[1:], tensors(b)[1:], strict=True):
        shape = (*of_a.shape, *[1] * (x.ndim - 2))
        means.append(of_a.view(shape) * x + of_b.view(shape) * y)
    return Context(log_mass, *means)
