"""Models trained with the official code (github.com/benbergner/ips) run here: their state dict, in our names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ips.network.encoder import load_weights
from ips.network.heads import Kind, head_path
from ips.network.model import IPSModel

_ATTENTION = {"q_w": "query_proj", "k_w": "key_proj", "v_w": "value_proj", "fc": "out_proj"}
_MLP = {"w_1": "mlp.0", "w_2": "mlp.2", "layer_norm": "mlp_norm"}


_QUERIES = "transf.crs_attn.q"
_HEAD = re.compile(r"output_layers\.(.+)\.0\.(weight|bias)")


def convert_official(
    state: Mapping[str, Tensor],
    tasks: Sequence[str],
    tokens: Sequence[str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Rename an official `IPSNet.state_dict()` for an `IPSModel` with the same sizes.

    The official network has an `nn.Sequential` as encoder (conv1, bn1, relu, maxpool, layer1, ...; or layer norm,
    linear, batch norm for features), gives probabilities where our heads give logits, and does not save its position
    table: use `IndexPositions` where it used positions.

    Args:
        state: the official state dict.
        tasks: names of the tasks in the order wanted here.
        tokens: their names in the order of the official tokens (the official `id`), where that is another; the state
            does not hold it. None: as `tasks`, and as the output layers stand in the state.
        kinds: `IPSModel.kinds`, of the heads that say theirs.
        ignore: names in the state to leave out, such as what a fork has for training alone.

    Raises:
        ValueError: names that the official network does not have, all of them listed; another number of tokens; an
            order of tokens that has to be told.
    """
    convolutional = "encoder.0.weight" in state
    converted, unknown = {}, []
    state = {name: value for name, value in state.items() if name not in ignore}
    for name, value in state.items():
        ours = _rename(name, tasks, kinds or {}, convolutional=convolutional)
        if ours is None:
            unknown.append(name)
        else:
            converted[ours] = value
    if unknown:
        raise ValueError(
            f"state: not names of the official network with tasks {list(tasks)}: {', '.join(unknown)}; "
            "ignore=(...) leaves out what is not needed"
        )
    if _QUERIES in state:
        queries = state[_QUERIES]
        if queries.ndim != 3 or queries.shape[:2] != (1, len(tasks)):
            raise ValueError(f"state: {_QUERIES} has shape {tuple(queries.shape)}; needs (1, {len(tasks)}, D)")
        converted["aggregator.attention.queries"] = queries[0, _order(state, tasks, tokens)]
    return converted


def _order(state: Mapping[str, Tensor], tasks: Sequence[str], tokens: Sequence[str] | None) -> list[int]:
    """Which official token each task has."""
    if tokens is None:
        layers = list(dict.fromkeys(match[1] for name in state if (match := _HEAD.fullmatch(name))))
        if layers != [task for task in tasks if task in layers]:
            raise ValueError(
                f"state: its output layers stand in the order {layers}, the tasks are {list(tasks)}; pass tokens, the "
                "names in the order of the official ids, since query tokens have numbers and no names"
            )
        tokens = tasks
    if sorted(tokens) != sorted(tasks):
        raise ValueError(f"tokens={list(tokens)} must be the tasks {list(tasks)}, in the order of the official ids")
    return [list(tokens).index(task) for task in tasks]


def load_official(
    model: IPSModel,
    state: Mapping[str, Tensor],
    tokens: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Load an official state dict into `model`, all or nothing; its normalisation stays as it is.

    `tokens` are the tasks in the order of the official ids, where that is not the model's, and `ignore` names to leave
    out (see `convert_official`).

    Raises:
        ValueError: names or shapes that do not fit, all of them listed; an order of tokens that has to be told.
    """
    converted = convert_official(state, model.tasks, tokens, model.kinds, ignore)
    load_weights(model, model.named({"mean": model.mean, "std": model.std, **converted}))


def _rename(name: str, tasks: Sequence[str], kinds: Mapping[str, Kind], *, convolutional: bool) -> str | None:
    if name == _QUERIES:
        return "aggregator.attention.queries"
    if match := re.fullmatch(r"encoder\.(\d+)\.(.+)", name):
        place, rest = int(match[1]), match[2]
        layers = {0: "conv1", 1: "bn1", **{3 + i: f"layer{i}" for i in (1, 2, 3, 4)}}
        layer = (layers if convolutional else {1: "linear", 2: "bn"}).get(place)
        return None if layer is None else f"encoder.{layer}.{rest}"
    if match := re.fullmatch(r"transf\.crs_attn\.(\w+)\.(\w+)", name):
        if match[1] == "layer_norm":
            return f"aggregator.attention_norm.{match[2]}"
        return f"aggregator.attention.{_ATTENTION[match[1]]}.{match[2]}" if match[1] in _ATTENTION else None
    if match := re.fullmatch(r"transf\.mlp\.(\w+)\.(\w+)", name):
        return f"aggregator.{_MLP[match[1]]}.{match[2]}" if match[1] in _MLP else None
    if (match := _HEAD.fullmatch(name)) and match[1] in tasks:
        path = head_path(list(tasks).index(match[1]), match[1], kinds.get(match[1]))
        return f"heads.{path}.{match[2]}"
    return None
