"""The maps of a slide: one number a patch, what it means, and in which version, so that no file is without."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bags.sources import Corners
from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Config
from pipeline.inference.explain import Explanation
from pipeline.inference.prediction import BagPrediction

METADATA = b"ips.maps"
_BINS = 20  # a decade, of the histograms that colours are fixed by
_DECADES = range(-9, 10)

Floats = npt.NDArray[np.float32]
Definition = dict[str, str]


def definitions(
    config: Config, effects: Sequence[str], heads: Sequence[str], members: Sequence[str] = (), models: int = 1
) -> dict[str, Definition]:
    """Column of `attention.parquet` -> what it is, its version and its unit.

    Args:
        config: of the model.
        effects: output columns that have an effect.
        heads: `<task>_<head>`, where asked for.
        members: `member_<number>`, likewise.
        models: of an ensemble.
    """
    selecting = config.model.select
    patients = config.cohort.bag == "patient"
    over = f"the patches of {f'all slides of the {config.cohort.whole}' if patients else 'the slide'}"
    if selecting.mode in ("random", "every"):
        over = "the patches that the model saw, and 0 for the others"
    pooled = "all patches" if selecting.context == "all" else f"the {selecting.memory} selected patches"
    attention = f"softmax of the attention's logits over {over}, mean over heads and tasks"
    found = {
        "attention": {"version": "attention/1", "unit": "share; sums to 1", "definition": attention},
        "score": {
            "version": "score/1",
            "unit": "multiple of uniform attention",
            "definition": f"attention times the number of {'these' if patients else 'patches'}: where the model "
            "looked, not what that did",
        },
    }
    for column in effects:
        found[f"effect_{column}"] = {
            "version": "effect/1",
            "unit": "value" if column.endswith("_value") else "log odds",
            "definition": f"what {column} gains by the patch: the output pooled over {pooled}, less that over the same "
            "without it, exactly; 0 for patches that it is not pooled of",
        }
    for name in heads:
        found[f"attention_{name}"] = {
            "version": "attention/1",
            "unit": "share; sums to 1",
            "definition": f"softmax of the attention's logits over {over}, of this task (first) and head (last) alone",
        }
    for name in members:
        found[f"attention_{name}"] = {**found["attention"], "definition": f"{attention}, of this model alone"}
    if models > 1:
        found["attention"]["definition"] = f"mean over {models} models of the {attention}"
    return found


def head_columns(tasks: Sequence[TaskConfig], found: BagPrediction) -> dict[str, Floats]:
    """`<task>_<head>` -> attention (N,), where heads were asked for."""
    if found.heads is None:
        return {}
    return {
        f"{task.name}_{head}": found.heads[:, head, place]
        for place, task in enumerate(tasks)
        for head in range(found.heads.shape[1])
    }


def map_table(
    index: Corners,
    extent: float,
    found: BagPrediction,
    explanation: Explanation | None,
    config: Config,
    among: int | None = None,
    *,
    models: int = 1,
    members: Mapping[str, Floats] | None = None,
) -> pa.Table:
    """One row a patch, as the README of this room says.

    Args:
        index: where the patches are.
        extent: their edge, level-0 px.
        found: what is said of these patches.
        explanation: of these patches.
        config: of the model.
        among: how many patches are in the bag; None where these are all.
        models: whose mean it is.
        members: name -> attention (N,) of each of these, where asked for.
    """
    n = len(found.attention)
    selected = np.zeros(n, np.bool_)
    selected[found.selected] = True
    columns: dict[str, Any] = {
        "row": np.arange(n),
        "x": np.asarray(index.x, np.int64),
        "y": np.asarray(index.y, np.int64),
        "size": np.full(n, extent, np.float32),
        "score": (found.attention.astype(np.float64) * (among or n)).astype(np.float32),
        "attention": found.attention,
        "selected": selected,
    }
    effects = {} if explanation is None else explanation.effect
    heads = head_columns(config.tasks, found)
    columns |= {f"effect_{name}": values for name, values in effects.items()}
    columns |= {f"attention_{name}": values for name, values in {**heads, **(members or {})}.items()}
    about = json.dumps(definitions(config, list(effects), list(heads), list(members or {}), models), sort_keys=True)
    return pa.table(columns).replace_schema_metadata({METADATA: about.encode()})


def as_parquet(table: pa.Table) -> bytes:
    """Equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_maps(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """What `as_parquet` was given."""
    return pq.read_table(pa.BufferReader(data), columns=columns)


def histograms(table: pa.Table) -> dict[str, dict[str, int]]:
    """`score` and `effect` -> how many patches have a number of about this size, whatever its sign; of all outputs."""
    names = {
        "score": ["score"],
        "effect": [name for name in table.column_names if name.startswith("effect_")],
    }
    return {
        kind: _histogram(np.concatenate([table[name].to_numpy() for name in own])) for kind, own in names.items() if own
    }


def _histogram(values: Floats) -> dict[str, int]:
    """Number of the bin -> count; `-` for what is nothing. Bin b holds sizes from 10 ** (b / 20)."""
    sizes = np.abs(values.astype(np.float64))
    least, most = 10.0**_DECADES.start, 10.0 ** (_DECADES.stop - 1)
    some = sizes[sizes >= least]
    bins = np.floor(np.log10(np.minimum(some, most)) * _BINS).astype(int)
    numbers, counts = np.unique(bins, return_counts=True)
    found = {str(number): int(many) for number, many in zip(numbers.tolist(), counts.tolist(), strict=True)}
    return found | ({"-": len(sizes) - len(some)} if len(some) < len(sizes) else {})


QUANTILE = 0.999
"""Of the patches of all slides, each slide counting alike: where a colour scale ends."""


def colours(found: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, float]]:
    """The colour scales of slides with these histograms: the same, whatever order they come in.

    The scale of the score begins at uniform attention and is of ratios; that of the effect is about 0.
    """
    scales = {}
    for kind in ("score", "effect"):
        own = [one[kind] for one in found if kind in one]
        if own:
            high = _quantile(own)
            low = 1.0 if kind == "score" else -high
            scales[kind] = {"low": low, "high": max(high, 2.0) if kind == "score" else high, "quantile": QUANTILE}
    return scales


def _quantile(found: Sequence[Mapping[str, int]]) -> float:
    """Upper end of the bin in which it lies, three digits of it."""
    weights: dict[int, float] = {}
    nothing = 0.0
    for one in sorted(found, key=lambda counts: sorted(counts.items())):  # sums do not depend on the order of slides
        total = sum(one.values())
        for name, many in one.items():
            if name == "-":
                nothing += many / total
            else:
                weights[int(name)] = weights.get(int(name), 0.0) + many / total
    reached = nothing
    last = min(weights, default=_DECADES.start * _BINS)
    for number in sorted(weights):
        if reached > QUANTILE * len(found):
            break
        reached, last = reached + weights[number], number
    return float(f"{10 ** ((last + 1) / _BINS):.3g}")
