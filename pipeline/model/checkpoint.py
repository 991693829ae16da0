"""A training checkpoint as a folder: a model's two files, and state.pt, which is read with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ips.network.tensors import read_tensors
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.model.folder import load_weights, save_model

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
    """Of the last complete epoch, so that a finished run that is started again still has them."""
    step_in_epoch: int = 0
    """Steps of the epoch under way that are taken; 0 between epochs."""
    tally: dict[str, float] = field(default_factory=dict)
    """Sums over those steps, so that the epoch's metrics count them after a restart."""
    best: str | None = None
    """Name of the best checkpoint so far, where the recipe keeps one."""
    is_last: bool = False
    """Whether the run ends with it."""
    run_id: str | None = None
    """The MLflow run that wrote it."""
    unsent: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    """Metrics that MLflow had not confirmed: (step, ms since 1970, metrics)."""

    @property
    def name(self) -> str:
        """Folder of the checkpoint, below the run's folder; names sort by step."""
        return f"step-{self.step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """A training state copied to the host: the training may go on while it is written."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    config: Config
    progress: Progress
    winners: Mapping[str, Tensor] | None = None
    """Of the training slides, where they serve several visits."""


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    progress: Progress,
    winners: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy all that a run needs to go on as if it had never stopped.

    Random numbers and the learning rate are pure functions of (seed, step, rank), so neither is stored.
    """
    return Snapshot(_copied(model.state_dict()), _copied(optimizer.state_dict()), config, progress, winners)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write the three files of a checkpoint into an existing folder."""
    save_model(folder, snapshot.weights, snapshot.config)
    state = {"optimizer": snapshot.optimizer, "progress": asdict(snapshot.progress)}
    torch.save(state if snapshot.winners is None else {**state, "winners": dict(snapshot.winners)}, folder / STATE)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, progress: Progress
) -> None:
    """Write a checkpoint into an existing folder, at once."""
    write_snapshot(folder, take_snapshot(model, optimizer, config, progress))


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan_digest: str,
    take_winners: Callable[[Mapping[str, Tensor] | None], None] | None = None,
) -> Progress:
    """Restore model and optimiser, and give `take_winners` the winners, or None where there are none.

    Raises:
        StageError: the checkpoint follows another plan or is of another version, or `take_winners` raised ValueError.
    """
    try:
        with (folder / STATE).open("rb") as file:
            state: dict[str, Any] = read_tensors(file)
        progress = Progress(**state["progress"])
        check_plan(str(folder), progress, plan_digest)
        load_weights(model, folder)
        optimizer.load_state_dict(state["optimizer"])
        if take_winners is not None:
            take_winners(state.get("winners"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{folder / STATE}: cannot be read as a training state of this version ({error}); go on with the version "
            "that wrote it, or remove the run's folder to train anew"
        ) from error
    return progress


def check_plan(uri: str, progress: Progress, plan_digest: str) -> None:
    """StageError when a checkpoint belongs to other slides or another recipe."""
    if progress.plan_digest != plan_digest:
        raise StageError(
            f"{uri}: this checkpoint follows another plan (digest {progress.plan_digest}, now {plan_digest}): it was "
            "copied from another recipe; remove or move the folder of the run that it lies in to train anew"
        )


def _copied(value: Any) -> Any:
    """Nested mappings and sequences with every tensor copied to the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
