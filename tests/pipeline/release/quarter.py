"""A cohort that grows month by month, and the config that a schedule retrains it by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from tests.pipeline.release.space import paint

GATE = (
    "gate.first=floors",
    "gate.floors=[{measure: auc, bound: 0.6, least: 5}]",
    "gate.no_worse={margin: 0.2, least: 5, resamples: 500}",
    "gate.drift={effect: 0.9, alpha: 0.05, least: 6}",
    "gate.lost={slides: 0.04}",
)


@dataclass
class Growing:
    """The folder of slides and their cohort file."""

    folder: Path
    rows: list[tuple[str, str]] = field(default_factory=list)
    """Name and label of each slide; every one is its own patient."""
    painted: int = 0
    """Slides so far, of which no two are alike."""

    def add(self, month: str, count: int, *, shade: int = 0, flipped: bool = False, broken: int = 0) -> None:
        """New slides. `shade`: of another stain; `flipped`: with wrong labels; `broken`: as many that are no images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name, label = f"{month}-{number:02d}", ("no", "yes")[number % 2]
            path = self.folder / f"{name}.png"
            paint(path, self.painted, label, shade)
            self.painted += 1
            if number < broken:
                path.write_bytes(path.read_bytes()[:200])
            self.rows.append((name, ("yes" if label == "no" else "no") if flipped else label))
        self.write()

    def write(self) -> None:
        """The cohort file."""
        lines = [f"{name},{name}.png,p-{name},{label}" for name, label in self.rows]
        (self.folder / "cohort.csv").write_text("\n".join(["slide_id,uri,patient_id,label", *lines]) + "\n")

    @property
    def overrides(self) -> list[str]:
        """Of the default config."""
        return [
            f"cohort.uri={self.folder / 'cohort.csv'}",
            f"storage.root={self.folder.parent / 'root'}",
            "name=quarter",
            'tasks=[{name: tumour, column: label, classes: ["no", "yes"]}]',
            "tiling=image",
            "tiling.patch_px=32",
            "tiling.edge=drop",
            "tiling.max_bad_slides=9",
            "model.encoder.stages=2",
            "model.aggregator={heads: 2, key_dim: 8, hidden_dim: 32, dropout: 0.0}",
            "model.select={memory: 8, chunk: 32}",
            "train.epochs=12",
            "train.warmup_epochs=1",
            "train.batch_size=8",
            "train.lr=0.003",
            "train.augment=false",
            "train.threads=1",
            "cluster.cpus_per_worker=1",
            "evaluate.bootstrap=50",
            "cohort.split={train: 0.6, val: 0.0, test: 0.4}",
            *GATE,
        ]

    def config(self, *more: str) -> Config:
        """The config, with what is to be different."""
        return load_config("default", [*self.overrides, *more])

    def ungated(self) -> Config:
        """The config without a gate."""
        return load_config("default", [one for one in self.overrides if one not in GATE])
