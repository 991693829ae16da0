"""When training ends early, and which look at the validation split was the best: a pure function of the looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.model import TrainConfig
from pipeline.errors import StageError


@dataclass(frozen=True)
class Watch:
    """How the looks at the validation split went so far."""

    best: float | None = None
    """Of the monitored metric."""
    best_epoch: int = 0
    """Epochs completed at the best look; 0 before any."""
    waited: int = 0
    """Looks since then."""

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> Watch:
        """As an epoch's metrics have it (`metrics`); they stand in the checkpoint, so a resumed run goes on from it."""
        return cls(metrics.get("best_look"), int(metrics.get("best_epoch", 0)), int(metrics.get("looks_since_best", 0)))

    @property
    def metrics(self) -> dict[str, float]:
        """What an epoch's metrics say of it."""
        if self.best is None:
            return {}
        return {
            "best_look": self.best,
            "best_epoch": float(self.best_epoch),
            "looks_since_best": float(self.waited),
        }

    def after(self, metrics: Mapping[str, float], epoch: int, settings: TrainConfig) -> Watch:
        """After a look at the end of so many epochs; equal is not better.

        Args:
            metrics: with val_loss or val_score, whichever is monitored.
            epoch: epochs completed.
            settings: what is monitored.

        Raises:
            StageError: the validation split cannot give the monitored metric.
        """
        name = f"val_{settings.monitor}"
        if name not in metrics:
            raise StageError(
                f"train: the validation slides give no {name}, by which train.patience and train.keep_best go; label "
                "slides of every class in the val split, or set train.monitor=loss"
            )
        value = metrics[name]
        better = self.best is None or (value < self.best if settings.monitor == "loss" else value > self.best)
        return Watch(value, epoch, 0) if better else Watch(self.best, self.best_epoch, self.waited + 1)

    def is_over(self, settings: TrainConfig) -> bool:
        """Whether training ends here."""
        return settings.patience is not None and self.waited >= settings.patience
