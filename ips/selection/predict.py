"""From bags to probabilities in one call: the selection, then the winners through the model, in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ips.bag import Bag, Selection
from ips.network.heads import probabilities
from ips.network.model import IPSModel, evaluating, unwrapped
from ips.selection.intake import take
from ips.selection.ranking import Rank
from ips.selection.scorer import Scorer
from ips.selection.select import Mode, placed, select
from ips.selection.transfer import arrived


class Prediction(NamedTuple):
    """What a model says of B images, and what it looked at."""

    probabilities: dict[str, Tensor]
    """Task -> (B, K) on the host, as `ips.network.heads.probabilities` says for each kind."""
    selection: Selection


@torch.no_grad()
def predict(
    model: nn.Module,
    bags: Sequence[Bag],
    memory: int,
    chunk: int,
    mode: Mode = "exact",
    *,
    attention: bool | Literal["each"] = False,
    dtype: torch.dtype | None = None,
    scorer: Scorer | None = None,
    context: bool = False,
    rank: Rank = "mean",
) -> Prediction:
    """Select in each of B images, encode the winners `chunk` at a time, and say what their logits mean.

    Args:
        model: whose heads say their kinds, as those of `linear_head`; its modes are as before afterwards.
        bags: B bags; `[bag]` for one image.
        memory: see `select`, as for the other arguments.
        chunk: as there, and patches encoded at a time afterwards.
        mode: as there.
        attention: as there.
        dtype: of the selection; the winners are encoded in the model's own.
        scorer: as there.
        context: pool all N patches, as a model wants it that was trained so: the winners are not encoded again, and
            the answer does not depend on how many there are. It is of the precision of the selection then.
        rank: as in `select`.

    Raises:
        ValueError: a head that does not say its kind; where `select` raises it.
    """
    inner = unwrapped(model)
    if silent := [task for task in inner.tasks if task not in inner.kinds]:
        raise ValueError(f"model: its heads of {silent} do not say what their logits mean; make them by `linear_head`")
    pooled: Literal["whole"] | None = "whole" if context else None
    selection = select(
        inner, bags, memory, chunk, mode, attention=attention, dtype=dtype, scorer=scorer, context=pooled, rank=rank
    )
    with evaluating(inner), torch.autocast(inner.mean.device.type, enabled=False):
        whole = selection.whole
        outputs = _pooled(inner, bags, selection, chunk) if whole is None else inner.recall(whole)
    return Prediction({task: probabilities(inner.kinds[task], x).cpu() for task, x in outputs.items()}, selection)


def _pooled(model: IPSModel, bags: Sequence[Bag], selection: Selection, chunk: int) -> dict[str, Tensor]:
    device, embeddings, positions = model.mean.device, [], []
    for number, (index, mask) in enumerate(zip(selection.index, selection.mask, strict=True)):
        for rows in index[mask].split(chunk):
            (taken,) = take(bags, [(number, rows)])
            embeddings.append(model.embed(arrived(taken, device)))
            positions += [] if taken.positions is None else [taken.positions]
    places = model.places(selection.index, placed(positions, selection))
    real = selection.mask.flatten().nonzero().squeeze(1).to(device)
    places = None if places is None else places.to(device)
    return model.pool(torch.cat(embeddings), selection.mask.to(device), places, real)
