"""From the config to `ips` objects: the only bridge between the two, and the only file that knows timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ips.learning.schedule import parameter_groups
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector, ResNet, TwoScales, WrappedEncoder, load_weights, read_weights
from ips.network.heads import linear_head
from ips.network.model import IPSModel, evaluating
from ips.network.part import PatchEncoder
from ips.network.pooling import GatedAttention, MaxPool, MeanPool
from ips.network.positions import GridPositions, IndexPositions
from ips.network.transformer import Architecture, VisionTransformer, from_conch, from_transformers
from pipeline.config.encoders import PRESETS
from pipeline.config.model import AggregatorConfig, EncoderConfig, TrainConfig
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.storage.files import read_bytes

_PROJECTED = 512  # width of embeddings made of stored features, as in the paper's CAMELYON16 setting
_NAMINGS: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "timm": dict,
    "transformers": from_transformers,
    "conch": from_conch,
}
_POSITIONS = {"index": IndexPositions, "grid": GridPositions}


def build_model(config: Config, *, pretrained: bool = True) -> IPSModel:
    """The network of a config, on the CPU; `pretrained=False` skips weights that are about to be overwritten.

    Raises:
        ConfigError: `model.encoder.weights` does not fit the encoder, or `train.begins_with` the network, the
            encoder's width does not suit `model.positions`, or timm is asked for and not installed, or its network
            cannot take patches of `tiling.patch_px`.
        StorageError: the weights cannot be read.
    """
    settings, begins = config.model, config.train.begins_with if pretrained else None
    encoder, dim = _encoder(settings.encoder, pretrained=pretrained and begins is None)
    if settings.encoder.name.startswith("timm:") and config.tiling.patch_px != "native":
        _try(cast(WrappedEncoder, encoder), f"model.encoder.name: {settings.encoder.name}", config.tiling.patch_px)
    if config.tiling.context_mpp is not None and settings.encoder.features is None:
        encoder = TwoScales(encoder)
        dim = encoder.dim
    aggregator = _pool(settings.aggregator, dim, tasks=len(config.tasks))
    heads = {task.name: linear_head(task.kind, dim, len(task.outputs)) for task in config.tasks}
    try:
        position = None if settings.positions == "none" else _POSITIONS[settings.positions](dim)
    except ValueError as error:
        raise ConfigError("config", [f"model.positions: {settings.positions}: {error}"]) from error
    model = IPSModel(encoder, aggregator, heads, position, settings.mean, settings.std)
    if begins is not None:
        _begin(model, begins)
    return model


def _begin(model: IPSModel, uri: str) -> None:
    """Give the network all the weights of another one of its shape."""
    try:
        model.load_state_dict(safetensors.torch.load(read_bytes(uri)))
    except (RuntimeError, SafetensorError) as error:
        problem = f"train.begins_with: {uri}: not the weights of a model of this shape ({error}); name another, or null"
        raise ConfigError("config", [problem]) from error


def build_optimizer(model: IPSModel, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; norms, biases and queries do not decay. The loop sets the learning rate of each step."""
    scale = 1.0 if train.encoder_lr is None else train.encoder_lr / train.lr
    return torch.optim.AdamW(parameter_groups(model, train.weight_decay, {"encoder.": scale}), lr=train.lr)


def _pool(settings: AggregatorConfig, dim: int, tasks: int) -> nn.Module:
    if settings.pool == "gated":
        return GatedAttention(dim, tasks, settings.hidden_dim)
    if settings.pool != "attention":
        return MeanPool(tasks) if settings.pool == "mean" else MaxPool(tasks)
    return Aggregator(
        dim,
        tasks=tasks,
        heads=settings.heads,
        key_dim=settings.key_dim,
        value_dim=settings.key_dim,
        hidden_dim=settings.hidden_dim,
        dropout=settings.dropout,
    )


def build_encoder(settings: EncoderConfig) -> tuple[PatchEncoder, int]:
    """The network that makes features, with its weights, on the CPU, and its D; errors as `build_model`."""
    return _encoder(settings, pretrained=True, field="embed.encoder")


def check_weights(field: str, settings: EncoderConfig) -> None:
    """Refuse, by ConfigError, pretrained weights that do not fit their network; `field` is its section."""
    if settings.weights is not None:
        _encoder(settings, pretrained=True, field=field)


def check_encoder(field: str, settings: EncoderConfig, patch_px: int) -> None:
    """Refuse, by ConfigError, a network of timm that cannot take patches of this size; `field` is its section."""
    if settings.name.startswith("timm:"):
        encoder, _ = _encoder(settings, pretrained=False)
        _try(cast(WrappedEncoder, encoder), f"{field}.name: {settings.name}", patch_px)


def _try(encoder: WrappedEncoder, name: str, patch_px: int) -> None:
    """One patch through a network that we do not know: many transformers take one size alone, and assert it."""
    try:
        with torch.no_grad(), evaluating(encoder):
            encoder(torch.zeros(1, encoder.channels, patch_px, patch_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        made_for = cast(_TimmNetwork, encoder.network).pretrained_cfg["input_size"][-1]
        problem = f"{name} cannot take patches of {patch_px} px ({error}); it was made for tiling.patch_px={made_for}"
        raise ConfigError("config", [problem]) from error


def _encoder(settings: EncoderConfig, *, pretrained: bool, field: str = "model.encoder") -> tuple[PatchEncoder, int]:
    """The encoder and D; `field` is its section of the config."""
    encoder: ResNet | FeatureProjector | WrappedEncoder
    trunk: nn.Module  # what the weights are of
    classifier: Sequence[str] = ()
    if settings.features is not None:
        encoder = trunk = FeatureProjector(settings.features, settings.dim or _PROJECTED)
    elif settings.name.startswith("timm:"):
        encoder = timm_encoder(settings.name.removeprefix("timm:"), settings.channels)
        trunk = encoder.network
        classifier = _classifier(cast(_TimmNetwork, trunk))
    elif settings.name in PRESETS:
        trunk = preset_network(settings.name)
        encoder = WrappedEncoder(trunk, trunk.dim, settings.channels)
    else:
        encoder = trunk = ResNet(settings.name, settings.stages, settings.channels)
    if pretrained and settings.weights is not None:
        try:
            data = read_bytes(settings.weights)
            if settings.name in PRESETS:
                load_preset(trunk, data, settings.name)
            else:
                load_weights(trunk, data, classifier)
        except ValueError as error:
            raise ConfigError("config", [f"{field}.weights: {settings.weights}: {error}"]) from error
    return encoder, encoder.dim


def preset_network(name: str) -> VisionTransformer:
    """The network of a preset, with random weights."""
    return VisionTransformer(Architecture(**PRESETS[name].architecture))


def load_preset(network: nn.Module, data: bytes, name: str) -> None:
    """Load the published weights of a preset.

    Raises:
        ValueError: they are of another network, which is named where it is one of the presets, or damaged.
    """
    state = _NAMINGS[PRESETS[name].naming](read_weights(data))
    try:
        load_weights(network, state)
    except ValueError as error:
        others = [other for other in PRESETS if other != name and _fits(state, other)]
        first, *more = str(error).split("; ")
        hint = f"they are those of {' or '.join(others)}; " if others else ""
        told = f"{first}, and {len(more)} more" if more else first
        preset = PRESETS[name]
        remedy = f"give {preset.file} of huggingface.co/{preset.repository}"
        raise ValueError(f"not the weights of {name}: {hint}{remedy} ({told})") from error


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    with torch.device("meta"):
        wanted = preset_network(name).state_dict()
    state = _NAMINGS[PRESETS[name].naming](state)
    return {name: x.shape for name, x in wanted.items()} == {name: x.shape for name, x in state.items()}


class _TimmNetwork(Protocol):
    head_hidden_size: int
    """D of what it gives without a classifier. Not `num_features`: MobileNetV3, VGG and others have a layer between."""
    pretrained_cfg: Mapping[str, Any]


def _classifier(network: _TimmNetwork) -> tuple[str, ...]:
    """The layers that published weights have and `network` was made without; two in distilled transformers."""
    named = network.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def timm_encoder(name: str, channels: int) -> WrappedEncoder:
    """A network of timm without its classifier and with random weights: nothing is downloaded.

    Raises:
        ConfigError: timm cannot be imported, or knows no network of that name.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision was built for another torch
        problem = (
            f"model.encoder.name: timm:{name} needs timm, which cannot be imported ({error}); "
            "pip install 'ips-pipeline[timm]', with the torchvision that belongs to your torch"
        )
        raise ConfigError("config", [problem]) from error
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError("config", [f"model.encoder.name: timm has no network {name!r}; near it are {close}"])
    network = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0)
    return WrappedEncoder(network, cast(_TimmNetwork, network).head_hidden_size, channels)
