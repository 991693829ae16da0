"""Models trained with the official code (github.com/benbergner/ips) run here: their state dict, in our names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ips.encoder import load_weights
from ips.model import IPSModel

_ATTENTION = {"q_w": "query_proj", "k_w": "key_proj", "v_w": "value_proj", "fc": "out_proj"}
_MLP = {"w_1": "mlp.0", "w_2": "mlp.2", "layer_norm": "mlp_norm"}


def convert_official(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Rename an official `IPSNet.state_dict()` for an `IPSModel` with the same sizes.

    The official network has an `nn.Sequential` as encoder (conv1, bn1, relu, maxpool, layer1, ...; or layer norm,
    linear, batch norm for features), gives probabilities where our heads give logits, and does not save its position
    table: use `IndexPositions` where it used positions.

    Args:
        state: the official state dict.
        tasks: names of the tasks in the order of their tokens (the official `id`).

    Raises:
        ValueError: names that the official network does not have; all are listed.
    """
    convolutional = "encoder.0.weight" in state
    converted, unknown = {}, []
    for name, value in state.items():
        ours = _rename(name, tasks, convolutional=convolutional)
        if ours is None:
            unknown.append(name)
        else:
            converted[ours] = value[0] if name == "transf.crs_attn.q" else value
    if unknown:
        raise ValueError(f"state: not names of the official network with tasks {list(tasks)}: {', '.join(unknown)}")
    return converted


def load_official(model: IPSModel, state: Mapping[str, Tensor]) -> None:
    """Load an official state dict into `model`, all or nothing; its normalisation stays as it is.

    Raises:
        ValueError: names or shapes that do not fit; all are listed.
    """
    converted = convert_official(state, model.tasks)
    load_weights(model, {"mean": model.mean, "std": model.std, **converted})


def _rename(name: str, tasks: Sequence[str], *, convolutional: bool) -> str | None:
    if name == "transf.crs_attn.q":
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
    if (match := re.fullmatch(r"output_layers\.(.+)\.0\.(weight|bias)", name)) and match[1] in tasks:
        return f"heads.{list(tasks).index(match[1])}.{match[2]}"
    return None
