"""The selection (paper Algorithm 1): which M of an image's N patches the network looks at.

- `exact` caches the logits of all patches on the host (N * J floats) and ranks by the softmax over the whole image:
  the answer does not depend on chunk size, order or sharding.
- `window` is the official loop: the softmax runs over the M + I patches at hand, so order and chunk size matter where
  J = H*T > 1. A patch's logits do not depend on others, so the buffer holds logits instead of embeddings.

Either ranks by the mean over heads and tasks, or lets these take patches in turn; then both have the same winners.

In either, the pass can add up what all N patches put into the pool (`ips.network.context`), or all but the winners:
those are encoded once more by the same scorer, which gives the same numbers bit for bit, and taken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ips.bag import Bag, Batch, Certificate, Chunk, Context, Selection, Values
from ips.network.context import joined, without
from ips.network.model import IPSModel, unwrapped
from ips.selection.certify import certified
from ips.selection.intake import check_again, check_bags, check_count, check_logits, checked, take
from ips.selection.pools import Draw, LogitCache, Pool, Sums, ValueCache, Window, won
from ips.selection.ranking import Rank
from ips.selection.scorer import Scorer, kept_scorer
from ips.selection.shards import Strips, strips
from ips.selection.stream import Stream, score_rows
from ips.selection.transfer import arrived

Mode = Literal["exact", "window"]


@torch.no_grad()
def select(
    model: nn.Module,
    bags: Sequence[Bag],
    memory: int,
    chunk: int,
    mode: Mode = "exact",
    *,
    attention: bool | Literal["each"] = False,
    dtype: torch.dtype | None = None,
    scorer: Scorer | None = None,
    certify: bool = False,
    group: dist.ProcessGroup | None = None,
    context: Literal["whole", "rest"] | None = None,
    values: bool = False,
    draw: Draw | Sequence[Draw] | None = None,
    rank: Rank = "mean",
) -> Selection:
    """Choose the M best patches of each of B images, without gradient and in evaluation mode.

    Args:
        model: an `IPSModel`, also in DistributedDataParallel, AveragedModel or torch.compile, all of which are passed
            by: nothing is exchanged. Its modes are as before when this returns or raises.
        bags: B bags, of any lengths.
        memory: M. Shorter bags are masked.
        chunk: I, patches read at a time.
        mode: `exact` or `window`, see the module.
        attention: also return each image's full attention, on the host: (N,), or with `each` (N, H, T).
        dtype: precision of the encoder in this pass: bfloat16, or the model's own, which None means.
        scorer: of this model, for measures of your own, and of a `dtype`. Without, the model keeps one for each dtype.
        certify: score the patches that bfloat16 leaves in doubt again in float32 (`ips.selection.certify`); exact only.
        group: split the rows of every bag over these processes, which call with the same bags, weights and statistics
            (`average_statistics`; nobody checks), and all get the whole answer; exact only.
        context: `whole`: also what all N patches put into the pool, for `IPSModel.recall`. `rest`: what those do that
            are no winners, to train on. J*(D+2) numbers an image; for it J*D*D_v more, and M more patches are encoded.
        values: also return each image's logits and values, on the host, for `effects`: H*D_v numbers a patch.
        draw: who wins instead of the best, of all images or of each; alike in all of `group`; exact only.
        rank: `mean`: the best by the mean over heads and tasks. `heads`: what these take in turn (`ranking.in_turns`).

    Raises:
        ValueError: an argument out of range, an empty bag, patches, positions or logits that are malformed or not
            finite, processes with different bags; what a bag itself raises passes through.
        RuntimeError: the selection failed on another process of `group`.
    """
    inner = unwrapped(model)
    _check_modes(mode, attention, context, rank, draw, exact_only=certify or group is not None)
    shares = None if group is None else strips(group)
    with nullcontext() if shares is None else shares.together():
        check_bags(bags, memory)
        check_count("chunk", chunk)
        scorer = _scorer(inner, dtype, scorer, certify=certify)
    if shares is not None:
        shares.check_alike(bags, {"logits a patch": scorer.width, "bytes a logit": scorer.logit_dtype.itemsize})
    taken = _Taken.of(scorer, bags, (memory, chunk, mode, rank), logits=bool(attention), values=values, context=context)
    _score(scorer, bags, chunk, taken, shares)
    certificates = _certificates(inner, scorer, bags, taken.caches, memory, chunk, shares) if certify else None
    each = len(inner.tasks) if attention == "each" else None
    maps = tuple(cache.attention(each) for cache in taken.caches) if attention else None
    winners = won(taken.pools, memory, draw, weighted=context == "rest")
    found = assemble(winners, memory, [pool.scored for pool in taken.pools], maps, certificates)
    return _with_embeddings(found, scorer, bags, chunk, taken, shares)


@dataclass(frozen=True)
class _Taken:
    """What is collected in the pass over all patches."""

    caches: Sequence[LogitCache]
    pools: Sequence[Pool]
    sums: Sums | None
    values: ValueCache | None

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        bags: Sequence[Bag],
        how: tuple[int, int, Mode, Rank],
        *,
        logits: bool,
        values: bool,
        context: str | None,
    ) -> _Taken:
        """Nothing yet; `how` is memory, chunk, mode and rank, `logits` whether they are kept for their own sake."""
        memory, chunk, mode, rank = how
        model, kind = scorer.model, (scorer.width, scorer.logit_dtype, rank)
        caches = [LogitCache(len(bag), *kind) for bag in bags] if logits or values or mode == "exact" else []
        return cls(
            caches,
            caches if mode == "exact" else [Window(memory, chunk, *kind) for _ in bags],
            None if context is None else Sums(model, len(bags), learn=context == "rest"),
            ValueCache(model, [len(bag) for bag in bags]) if values else None,
        )

    def sinks(self) -> list[tuple[Pool, ...]]:
        """Who takes the logits of each image."""
        if self.pools is self.caches or not self.caches:
            return [(pool,) for pool in self.pools]
        return list(zip(self.pools, self.caches, strict=True))

    def watch(self, number: int, index: Tensor, logits: Tensor, x: Tensor) -> None:
        """Take embeddings, where they are asked for."""
        for watch in (self.sums, self.values):
            if watch is not None:
                watch(number, index, logits, x)


def _with_embeddings(
    found: Selection, scorer: Scorer, bags: Sequence[Bag], chunk: int, taken: _Taken, shares: Strips | None
) -> Selection:
    """A selection and what is known of embeddings, where it was asked for."""
    if taken.values is not None:
        pairs = zip(taken.caches, taken.values.images, strict=True)
        found = replace(found, values=tuple(Values(cache.logits, every) for cache, every in pairs))
    if taken.sums is None:
        return found
    if not taken.sums.learn:
        return replace(found, whole=_joined(taken.sums.images, shares))
    return replace(found, rest=_rest(found, scorer, bags, chunk, taken, shares))


def _rest(
    found: Selection, scorer: Scorer, bags: Sequence[Bag], chunk: int, taken: _Taken, shares: Strips | None
) -> Context:
    """Of the patches that are no winners: each process takes off those of its own strip."""
    assert taken.sums is not None
    sums, part = taken.sums.images, Sums(scorer.model, len(bags), learn=True)
    with nullcontext() if shares is None else shares.together():
        won = []
        for number, (index, mask) in enumerate(zip(found.index, found.mask, strict=True)):
            low, stop = (0, len(bags[number])) if shares is None else shares.own(len(bags[number]))
            rows = index[mask]
            won.append((number, rows[(rows >= low) & (rows < stop)]))
        again = score_rows(scorer, bags, won, chunk, part)
        if found.certificates is None:  # or the logits at hand are those of another precision
            for (number, rows), logits in zip(won, again, strict=True):
                check_again(number, rows, taken.pools[number].of(rows), logits, scorer.dtype)
    return _joined([without(whole, own) for whole, own in zip(sums, part.images, strict=True)], shares)


def _joined(images: Sequence[Context], shares: Strips | None) -> Context:
    """Of B images, from all processes."""
    return joined(images) if shares is None else shares.sum(joined(images))


def _certificates(
    model: IPSModel,
    scorer: Scorer,
    bags: Sequence[Bag],
    caches: Sequence[LogitCache],
    memory: int,
    chunk: int,
    shares: Strips | None,
) -> tuple[Certificate, ...]:
    """Of every image; its cache is mended."""
    reference = _scorer(model, None, None, batch=scorer.asked_batch)
    with nullcontext() if shares is None else shares.together():
        return tuple(certified(cache, bags, n, memory, chunk, reference) for n, cache in enumerate(caches))


def _scorer(
    model: IPSModel,
    dtype: torch.dtype | None,
    given: Scorer | None,
    *,
    batch: int | None = None,
    certify: bool = False,
) -> Scorer:
    """The one given, or the model's own, as fresh as the model."""
    scorer = given or kept_scorer(model, dtype, batch)
    if given is not None and given.model is not model:
        raise ValueError("scorer scores another model than `model`; build a Scorer for each")
    scorer.follow()
    if dtype not in (None, scorer.dtype):
        raise ValueError(f"dtype={dtype}, but the scorer given encodes in {scorer.dtype}; leave dtype out")
    if certify and scorer.dtype != torch.bfloat16:
        raise ValueError("certify=True needs a bfloat16 selection; a float32 one has no doubtful patches")
    if certify and scorer.logit_dtype.itemsize < 4:
        raise ValueError(f"certify=True scores again with the model, which is in {scorer.logit_dtype}; needs float32")
    return scorer


def _check_modes(mode: str, attention: object, context: object, rank: str, draw: object, *, exact_only: bool) -> None:
    if mode not in ("exact", "window"):
        raise ValueError(f"mode={mode!r} must be 'exact' or 'window'")
    if attention not in (False, True, "each"):
        raise ValueError(f"attention={attention!r} must be False, True or 'each'")
    if context not in (None, "whole", "rest"):
        raise ValueError(f"context={context!r} must be None, 'whole' or 'rest'")
    if rank not in ("mean", "heads"):
        raise ValueError(f"rank={rank!r} must be 'mean' or 'heads'")
    if rank != "mean" and draw is not None:
        raise ValueError("rank='heads' says who wins, and so does draw; leave one of them out")
    if (exact_only or draw is not None) and mode != "exact":
        raise ValueError(f"mode={mode!r}: certify, group and draw need mode='exact', whose answer no order can change")


def _score(scorer: Scorer, bags: Sequence[Bag], chunk: int, taken: _Taken, shares: Strips | None) -> None:
    """Take what all patches give, each process those of its own strip; then all have all logits and values."""
    watched = taken.sums is not None or taken.values is not None
    stream = Stream(scorer, taken.watch if watched else None)
    if shares is None:
        parts = ((n, part) for n, bag in enumerate(bags) for part in bag.chunks(chunk))
        _fill(stream, scorer, bags, parts, taken.sinks(), shares)
        return
    with shares.together():
        _fill(stream, scorer, bags, shares.chunks(bags, chunk), taken.sinks(), shares)
    for cache in taken.caches:
        shares.merge(cache.logits)
    for every in taken.values.images if taken.values is not None else []:
        shares.merge(every)


def _fill(
    stream: Stream,
    scorer: Scorer,
    bags: Sequence[Bag],
    chunks: Iterator[tuple[int, Chunk]],
    sinks: Sequence[tuple[Pool, ...]],
    shares: Strips | None,
) -> None:
    seen = [torch.zeros(len(bag), dtype=torch.bool) for bag in bags]
    came = [0] * len(bags)
    with scorer.evaluating():
        for number, index, logits in stream.run(checked(scorer.model, chunks, [len(bag) for bag in bags])):
            check_logits(number, index, logits)
            seen[number][index] = True
            came[number] += len(index)
            for sink in sinks[number]:
                sink.add(index, logits)
    for number, rows in enumerate(seen):
        if shares is None and (came[number] != len(rows) or not rows.all()):
            different = int(rows.sum())
            raise ValueError(
                f"bags[{number}].chunks gave {came[number]} rows, {different} different rows of {len(rows)}; "
                "each must come once"
            )


def assemble(
    winners: Sequence[tuple[Tensor, ...]],
    memory: int,
    scored: Sequence[int],
    maps: tuple[Tensor, ...] | None = None,
    certificates: tuple[Certificate, ...] | None = None,
) -> Selection:
    """Rows, log scores and maybe weights of each image, over so many patches -> a padded `Selection`."""
    index = torch.full((len(winners), memory), -1, dtype=torch.int64)
    scores = torch.zeros(len(winners), memory)
    for number, (rows, keys, *_) in enumerate(winners):
        index[number, : len(rows)] = rows
        scores[number, : len(rows)] = keys.exp()
    weights = [_padded(own, memory) for _, _, *rest in winners for own in rest]
    weighed = torch.stack(weights) if weights else None
    return Selection(index, index >= 0, scores, maps, certificates, torch.tensor(scored), weights=weighed)


def gather(bags: Sequence[Bag], selection: Selection, device: torch.device | str) -> Batch:
    """The winners' patches on `device`, padded with zeros where masked.

    Raises:
        ValueError: as many bags as selected images are needed, all with patches of one shape and dtype, and finite;
            what a bag itself raises passes through.
    """
    B, M = selection.index.shape
    if len(bags) != B:
        raise ValueError(f"bags has {len(bags)} images, the selection {B}")
    rows = [index[mask] for index, mask in zip(selection.index, selection.mask, strict=True)]
    taken = take(bags, list(enumerate(rows)))
    target = torch.device(device)
    places = [_padded(chunk.positions, M) for chunk in taken if chunk.positions is not None]
    batch = Batch(  # masks are read here, on the host
        patches=torch.stack([_padded(arrived(chunk, target), M) for chunk in taken]),
        positions=torch.stack(places) if len(places) == B else None,
        index=selection.index,
        mask=selection.mask,
        rest=selection.rest,
        weights=selection.weights,
    )
    return batch.to(target)


def placed(positions: Sequence[Tensor], selection: Selection) -> Tensor | None:
    """Positions (n, 2) of the winners -> (B, M, 2) on the host, zeros where masked; None where bags have none."""
    if sum(map(len, positions)) < int(selection.mask.sum()):
        return None
    whole = torch.zeros(*selection.mask.shape, 2)
    whole[selection.mask] = torch.cat(list(positions)).to("cpu", torch.float32)
    return whole


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))
