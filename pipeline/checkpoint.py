"""A model folder (weights.safetensors, config.json) and a training checkpoint (the same plus state.pt).

Weights are safetensors: reading them executes nothing. `state.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.errors import StageError

WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
STATE = "state.pt"


@dataclass(frozen=True)
class Progress:
    """How far a run is, and which plan it follows."""

    epoch: int
    """Epochs completed."""
    step: int
    """Optimiser steps taken."""
    plan_digest: str
    """Digest of the slides, their sizes and the recipe; a checkpoint of another plan is refused."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last epoch, so that a finished run that is started again still has them."""


def save_model(folder: Path, weights: Mapping[str, Tensor], config: Config) -> None:
    """Write `weights.safetensors` and `config.json` into an existing folder."""
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """The config saved beside the weights; StageError where it is absent or of another version."""
    try:
        return Config.model_validate_json((folder / CONFIG).read_bytes())
    except (OSError, ValidationError) as error:
        raise StageError(f"{folder / CONFIG}: cannot be read as a config of this version ({error})") from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `weights.safetensors` into a model; StageError names missing and unexpected keys."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    own = set(model.state_dict())
    missing, unexpected = sorted(own - set(weights)), sorted(set(weights) - own)
    if missing or unexpected:
        raise StageError(f"{folder / WEIGHTS}: missing keys {missing}, unexpected keys {unexpected}")
    model.load_state_dict(weights)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, progress: Progress
) -> None:
    """Write all that a run needs to go on as if it had never stopped.

    Random numbers and the learning rate are pure functions of (seed, step, rank), so neither is stored.
    """
    save_model(folder, model.state_dict(), config)
    torch.save({"optimizer": optimizer.state_dict(), "progress": asdict(progress)}, folder / STATE)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, plan_digest: str) -> Progress:
    """Restore model and optimiser; StageError when the checkpoint follows another plan."""
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
    progress = Progress(**state["progress"])
    if progress.plan_digest != plan_digest:
        raise StageError(
            f"{folder}: this checkpoint follows another plan (digest {progress.plan_digest}, now {plan_digest}): "
            "its slides or recipe changed; remove the folder to train anew"
        )
    load_weights(model, folder)
    optimizer.load_state_dict(state["optimizer"])
    return progress
