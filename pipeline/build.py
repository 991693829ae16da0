"""From the config to `ips` objects: the only bridge between the two, and the only file that knows timm."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn

from ips.aggregator import Aggregator
from ips.baselines import GatedAttention, MaxPool, MeanPool
from ips.encoder import FeatureProjector, ResNet, WrappedEncoder, load_weights
from ips.heads import linear_head
from ips.model import IPSModel
from ips.positions import GridPositions, IndexPositions
from ips.schedule import parameter_groups
from pipeline.config import Config
from pipeline.config_model import AggregatorConfig, EncoderConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.storage import read_bytes

_PROJECTED = 512  # width of embeddings made of stored features, as in the paper's CAMELYON16 setting
_POSITIONS = {"index": IndexPositions, "grid": GridPositions}


def build_model(config: Config, *, pretrained: bool = True) -> IPSModel:
    """The network of a config, on the CPU; `pretrained=False` skips weights that are about to be overwritten.

    Raises:
        ConfigError: `model.encoder.weights` does not fit the encoder, its width does not suit `model.positions`, or
            timm is asked for and not installed.
        StorageError: the weights cannot be read.
    """
    settings = config.model
    encoder, dim = _encoder(settings.encoder, pretrained=pretrained)
    aggregator = _pool(settings.aggregator, dim, tasks=len(config.tasks))
    heads = {task.name: linear_head(task.kind, dim, len(task.outputs)) for task in config.tasks}
    try:
        position = None if settings.positions == "none" else _POSITIONS[settings.positions](dim)
    except ValueError as error:
        raise ConfigError("config", [f"model.positions: {settings.positions}: {error}"]) from error
    return IPSModel(encoder, aggregator, heads, position, settings.mean, settings.std)


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


def build_encoder(settings: EncoderConfig) -> tuple[nn.Module, int]:
    """A patch encoder with its weights, on the CPU, and its D; errors as `build_model`."""
    return _encoder(settings, pretrained=True)


def _encoder(settings: EncoderConfig, *, pretrained: bool) -> tuple[nn.Module, int]:
    """The encoder and D."""
    encoder: ResNet | FeatureProjector | WrappedEncoder
    trunk: nn.Module  # what the weights are of
    if settings.features is not None:
        encoder = trunk = FeatureProjector(settings.features, settings.dim or _PROJECTED)
    elif settings.name.startswith("timm:"):
        encoder = timm_encoder(settings.name.removeprefix("timm:"), settings.channels)
        trunk = encoder.network
    else:
        encoder = trunk = ResNet(settings.name, settings.stages, settings.channels)
    if pretrained and settings.weights is not None:
        try:
            load_weights(trunk, read_bytes(settings.weights))
        except ValueError as error:
            raise ConfigError("config", [f"model.encoder.weights: {settings.weights}: {error}"]) from error
    return encoder, encoder.dim


class _TimmNetwork(Protocol):
    num_features: int


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
    return WrappedEncoder(network, cast(_TimmNetwork, network).num_features, channels)
