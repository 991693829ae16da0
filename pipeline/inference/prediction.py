"""From a bag, or a slide file, to predictions and attention: shared by validation, evaluate, predict and serving."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from ips.bag import Bag, Selection, Values
from ips.network.aggregator import Aggregator
from ips.network.heads import probabilities
from ips.network.model import IPSModel, evaluating
from ips.network.pooling import GatedAttention
from ips.selection.baselines import every_patch, random_selection
from ips.selection.scorer import Scorer
from ips.selection.select import select
from ips.selection.transfer import arrived
from pipeline.bags.sources import PatchSource, Source, content_of, open_bag
from pipeline.bags.unseen import as_one, read_together, rows_of
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.errors import SlideError
from pipeline.inference.shards import Scores, selected
from pipeline.model.build import build_model
from pipeline.model.folder import EMBED_WEIGHTS, load_weights, read_config
from pipeline.schema import ATTENTION

RGB = npt.NDArray[np.uint8]

_SPREAD = 0x9E3779B1  # odd, so that no two seeds meet


@dataclass(frozen=True)
class BagPrediction:
    """What the model says of one bag of N patches."""

    values: Mapping[str, npt.NDArray[np.float64]]
    """Task -> (K,), one number for each of the task's `outputs`: probabilities of classes or labels, the value of a
    regression in its column's unit, or the probability of no event until the end of each time bin."""
    logits: Mapping[str, npt.NDArray[np.float64]]
    """Task -> (K,), as its head gives them."""
    attention: npt.NDArray[np.float32]
    """(N,) the softmax over the whole bag, averaged over heads and tasks; sums to 1. Where the mode is random or
    every: what the pool gives the selected patches, and 0 for the others."""
    selected: npt.NDArray[np.int64]
    """(<= M,) rows of the patches that the aggregator saw, most attended first; with `select.context: all` it saw all,
    and these are the M most attended."""
    heads: npt.NDArray[np.float32] | None = None
    """(N, H, T) the softmax over the whole bag of each head and task, where it was asked for."""
    pooled: Pooled | None = None
    """What the outputs were pooled of, where it was asked for and the aggregator is one that tells."""


@dataclass(frozen=True)
class Pooled:
    """The patches that the outputs were pooled of, and what each put into the pool."""

    rows: npt.NDArray[np.int64]
    """(n,) within the bag."""
    values: Values
    """Of these rows."""


@dataclass(frozen=True)
class SlidePrediction:
    """What the model says of one slide, alone or together with others of its patient."""

    found: BagPrediction
    """Of the bag that the slide is in."""
    rows: slice
    """Of the slide, in this bag."""
    attention: pa.Table
    """Schema ATTENTION, of this slide; over all slides of the bag it sums to 1."""
    key: str
    """Of the bag's patches."""
    own_key: str
    """Of the slide's."""
    content: str
    """Digest of what its files hold, whatever is tiled of it at which microns."""
    extent: float
    """Edge of a patch, in level-0 px."""
    mpp: float | None
    """Microns per level-0 px; None where it is not known."""
    n_bad_tiles: int
    """Patches that could not be decoded and were left out."""

    @property
    def values(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """As `BagPrediction.values`."""
        return self.found.values


def load_model(folder: Path, embed_weights: Path | None = None) -> tuple[IPSModel, Config]:
    """The model of a folder with weights.safetensors and config.json, on the GPU where there is one.

    Where the folder holds the weights that make its features too (`registry.register_model`), or `embed_weights` are
    there, the config names those; and the network that finds its tissue, as `read_config` does.

    Raises:
        StageError: the folder does not hold a model of this version.
    """
    config = _with_embed_weights(read_config(folder), embed_weights or folder / EMBED_WEIGHTS)
    model = build_model(config, pretrained=False)
    load_weights(model, folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), config


def _with_embed_weights(config: Config, packed: Path) -> Config:
    if config.embed is None or not packed.is_file():
        return config
    encoder = config.embed.encoder.model_copy(update={"weights": str(packed)})
    return config.model_copy(update={"embed": config.embed.model_copy(update={"encoder": encoder})})


def bag_scorer(model: IPSModel, config: Config, dtype: torch.dtype | None = None) -> Scorer | None:
    """The scorer for `predict_bag` on many bags, of the model as it is now; None where nothing is scored.

    It encodes in bfloat16 where that is the `dtype`, else in the model's own.
    """
    if config.model.select.mode not in ("exact", "window"):
        return None
    return Scorer(model, batch=config.train.score_batch, dtype=dtype)


def predict_bag(
    model: IPSModel,
    bag: Bag,
    config: Config,
    scorer: Scorer | None = None,
    seed: int = 0,
    *,
    heads: bool = False,
    pooled: bool = False,
    scores: Scores | None = None,
) -> BagPrediction:
    """Select as in training, then aggregate the winners; the model's modes are as before afterwards.

    Args:
        model: the one of the config.
        bag: N patches.
        config: how it is selected.
        scorer: `bag_scorer`; saves preparing the encoder for each of many bags.
        seed: draws the patches of mode random.
        heads: also give the attention of each head and task.
        pooled: also give what the outputs were pooled of; with `select.context: all` H*D_v numbers a patch.
        scores: of all patches, where others have scored them (`shards`); of mode exact.
    """
    selection = _selection(model, bag, config, scorer, seed, heads=heads, pooled=pooled, scores=scores)
    parts = None
    rows = selection.index[0][selection.mask[0]]
    with evaluating(model), torch.inference_mode():
        if selection.whole is not None:
            outputs = model.recall(selection.whole)
            if selection.values is not None:
                parts = Pooled(np.arange(len(bag)), selection.values[0])
        else:
            outputs, weights, values = _pool(model, bag, rows, config.model.select.chunk)
            parts = Pooled(rows.numpy(), values) if values is not None and pooled else None
    each = None
    if selection.attention is None:
        attention = torch.zeros(len(bag)).index_copy(0, rows, weights)
    else:
        attention = selection.attention[0]
        if attention.ndim > 1:
            each, attention = attention.numpy(), attention.double().flatten(1).mean(dim=1).float()
    return BagPrediction(
        values={task.name: in_unit(task, outputs[task.name])[0] for task in config.tasks},
        logits={task: logits.double().cpu().numpy()[0] for task, logits in outputs.items()},
        attention=attention.numpy(),
        selected=rows[attention[rows].argsort(descending=True, stable=True)].numpy(),
        heads=each,
        pooled=parts,
    )


def _selection(
    model: IPSModel,
    bag: Bag,
    config: Config,
    scorer: Scorer | None,
    seed: int,
    *,
    heads: bool,
    pooled: bool,
    scores: Scores | None,
) -> Selection:
    """Which patches the aggregator sees; arguments as of `predict_bag`."""
    selecting = config.model.select
    if selecting.mode == "random":
        generator = torch.Generator().manual_seed((len(bag) + seed * _SPREAD) % 2**32)  # it takes no more bits
        return random_selection([bag], selecting.memory, generator)
    if selecting.mode == "every":
        return every_patch([bag])
    if scores is not None:
        return selected(scores, selecting.memory, model, heads=heads, rank=selecting.rank)
    scorer, sizes = scorer or bag_scorer(model, config), (selecting.memory, selecting.chunk)
    context: Literal["whole"] | None = "whole" if selecting.context == "all" else None
    maps: Literal["each"] | bool = "each" if heads else True
    every = pooled and context is not None
    return select(
        model,
        [bag],
        *sizes,
        selecting.mode,
        attention=maps,
        scorer=scorer,
        context=context,
        values=every,
        rank=selecting.rank,
    )


def _pool(model: IPSModel, bag: Bag, rows: Tensor, chunk: int) -> tuple[dict[str, Tensor], Tensor, Values | None]:
    """Logits of the winners (n,), taken and encoded `chunk` at a time, the weight (n,) that each had in them, and what
    each put into the pool, of pools that can tell.

    Pools without attention give every patch the same weight.
    """
    device, embeddings, positions = model.mean.device, [], []
    for part in torch.split(rows, chunk):
        taken = bag.take(part)
        embeddings.append(model.embed(arrived(taken, device)))
        positions += [] if taken.positions is None else [taken.positions]
    whole, mask = torch.cat(embeddings), torch.ones(1, len(rows), dtype=torch.bool, device=device)
    places = model.places(rows.to(device)[None], torch.cat(positions).to(device)[None] if positions else None)
    placed = whole if model.position is None or places is None else whole + model.position(places)[0]
    weights, values = torch.full((len(rows),), 1 / len(rows)), None
    if isinstance(model.aggregator, GatedAttention):
        weights = model.aggregator.weights(placed[None], mask)[0].mean(dim=-1)
    elif isinstance(model.aggregator, Aggregator):
        attention = model.aggregator.attention
        own = torch.einsum("nd,hvd->nhv", placed, attention.projection())
        values = Values(attention.logits(placed).cpu(), own.cpu())
    return model.pool(whole, mask, places), weights.float().cpu(), values


def predict_slide(model: IPSModel, config: Config, slide: CohortSlide, *, pooled: bool = False) -> SlidePrediction:
    """As `predict_together`, of a slide alone."""
    return predict_together(model, config, [slide], pooled=pooled)[0]


def predict_together(
    model: IPSModel, config: Config, slides: Sequence[CohortSlide], *, pooled: bool = False
) -> list[SlidePrediction]:
    """Predict the slides of one patient as one bag: equal values for each, and each one's part of the attention.

    No stage has seen them: their patches are cut while they are read. Generated images come alone.

    `pooled`: see `predict_bag`.

    Raises:
        SlideError: one of them cannot be read or used.
    """

    def predict(sources: Sequence[Source]) -> list[SlidePrediction]:
        whole = as_one(slides, sources)
        bag = open_bag(whole, threads=torch.get_num_threads(), augment=None)
        found = predict_bag(model, bag, config, pooled=pooled)
        return [
            SlidePrediction(
                found=found,
                rows=rows,
                attention=attention_table(slide.slide_id, source, part_of(found, rows)),
                key=whole.key,
                own_key=source.key,
                content=content_of(source),
                extent=source.extent,
                mpp=source.mpp,
                n_bad_tiles=source.n_bad_tiles,
            )
            for slide, source, rows in zip(slides, sources, rows_of(sources), strict=True)
        ]

    return read_together(config, slides, predict)


def part_of(found: BagPrediction, rows: slice) -> BagPrediction:
    """What concerns these rows, counted from the first of them; without what the outputs were pooled of."""
    inside = (found.selected >= rows.start) & (found.selected < rows.stop)
    return replace(
        found,
        attention=found.attention[rows],
        selected=found.selected[inside] - rows.start,
        heads=None if found.heads is None else found.heads[rows],
        pooled=None,
    )


_MPP_REMEDY = {
    "missing-mpp": "give it",
    "absurd-mpp": "give it",
    "too-coarse": "patches are never enlarged; if that is wrong, give the right value",
}


def unpredicted(error: SlideError, mpp: str) -> str:
    """Why a slide has no prediction; `mpp` is what gives its microns per px, for how it is tiled is the model's."""
    fact, *remedies = str(error).replace("in the cohort's mpp column", mpp).split("; ")
    if error.reason in _MPP_REMEDY:
        return f"{fact}; {_MPP_REMEDY[error.reason]} {mpp}"
    possible = [remedy for remedy in remedies if "tiling." not in remedy]
    if len(possible) < len(remedies):
        possible.append("how it is tiled is the model's and cannot be set here")
    return "; ".join([fact, *possible])


def read_thumbnail(source: PatchSource) -> RGB:
    """The thumbnail (h, w, 3), `source.thumbnail_scale` level-0 px per px."""
    return np.asarray(Image.open(io.BytesIO(source.thumbnail())).convert("RGB"))


def attention_table(slide_id: str, source: PatchSource, found: BagPrediction) -> pa.Table:
    """One row a patch, schema ATTENTION."""
    index = source.index()
    selected = np.zeros(len(index.x), np.bool_)
    selected[found.selected] = True
    columns = [
        pa.array([slide_id]).take(pa.array(np.zeros(len(index.x), np.int64))),
        np.arange(len(index.x)),
        index.x,
        index.y,
        found.attention,
        selected,
    ]
    return pa.table(dict(zip(ATTENTION.names, columns, strict=True)), schema=ATTENTION)


def in_unit(task: TaskConfig, logits: Tensor) -> npt.NDArray[np.float64]:
    """Logits (n, K') -> (n, K) numbers in the task's unit, one for each of its outputs."""
    values = np.asarray(probabilities(task.kind, logits.double()).cpu().numpy())
    return values * task.std + task.mean if task.kind == "regression" else values
