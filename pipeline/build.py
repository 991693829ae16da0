"""From the config to `ips` objects: the only bridge between the two."""

from __future__ import annotations

import torch

from ips.aggregator import Aggregator
from ips.encoder import ResNet, load_weights
from ips.heads import linear_head
from ips.model import IPSModel
from ips.positions import GridPositions
from ips.schedule import parameter_groups
from pipeline.config import Config
from pipeline.config_model import EncoderConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.storage import read_bytes


def build_model(config: Config, *, pretrained: bool = True) -> IPSModel:
    """The network of a config, on the CPU; `pretrained=False` skips weights that are about to be overwritten.

    Raises ConfigError where `model.encoder.weights` does not fit the encoder, StorageError where it is absent.
    """
    encoder = _encoder(config.model.encoder, pretrained=pretrained)
    settings = config.model.aggregator
    aggregator = Aggregator(
        encoder.dim,
        tasks=len(config.tasks),
        heads=settings.heads,
        key_dim=settings.key_dim,
        value_dim=settings.key_dim,
        hidden_dim=settings.hidden_dim,
        dropout=settings.dropout,
    )
    heads = {task.name: linear_head(task.kind, encoder.dim, len(task.outputs)) for task in config.tasks}
    position = GridPositions(encoder.dim) if config.model.positions == "grid" else None
    return IPSModel(encoder, aggregator, heads, position, config.model.mean, config.model.std)


def build_optimizer(model: IPSModel, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; norms, biases and queries do not decay. The loop sets the learning rate of each step."""
    return torch.optim.AdamW(parameter_groups(model, train.weight_decay), lr=train.lr)


def _encoder(settings: EncoderConfig, *, pretrained: bool) -> ResNet:
    encoder = ResNet(settings.name, settings.stages)
    if pretrained and settings.weights is not None:
        try:
            load_weights(encoder, read_bytes(settings.weights))
        except ValueError as error:
            raise ConfigError("config", [f"model.encoder.weights: {settings.weights}: {error}"]) from error
    return encoder
