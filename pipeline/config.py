"""The configuration: what every field means, its unit and its default. YAML in `conf/` fills it.

Fields are frozen and unknown keys are refused. Fields marked *execution* say where and how fast, never what:
they do not enter any fingerprint, so changing them never makes a stage run again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.schema import SCHEMA_VERSION

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def fingerprint(value: object) -> str:
    """First 16 hex digits of the sha256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where everything is kept (execution)."""

    root: str = "runs"
    """Folder or s3://bucket/prefix of all that this config makes."""
    patches: str | None = None
    """Patch store; several configs may share one. Default: `<root>/patches`."""


class DemoConfig(Section):
    """The synthetic cohort that `pipeline demo` writes. Read when it is written; a cohort that is there stays."""

    slides: Annotated[int, Field(ge=12)] = 120
    seed: int = 0


class SplitConfig(Section):
    """Shares of the patients when the cohort has no `split` column."""

    train: Fraction = 0.6
    val: Fraction = 0.15
    test: Fraction = 0.25

    @model_validator(mode="after")
    def _sum(self) -> SplitConfig:
        if abs(self.train + self.val + self.test - 1.0) > 1e-6:
            raise ValueError(f"the shares sum to {self.train + self.val + self.test:g}; make them sum to 1")
        return self


class CohortConfig(Section):
    """Which slides."""

    uri: str
    """CSV or Parquet with columns slide_id, uri and optionally patient_id, split, mpp and labels."""
    split: SplitConfig = SplitConfig()
    demo: DemoConfig | None = None
    """Set: the cohort is the synthetic one and is written to `uri`'s folder when it is absent."""


class TilingConfig(Section):
    """How a slide becomes patches. The fingerprint of this section is the patch store's key."""

    patch_px: Annotated[int, Field(ge=8, le=4096)] = 256
    """Edge of a patch, in px, at `mpp`."""
    mpp: Annotated[float, Field(gt=0)] | None = 0.5
    """Microns per px of a patch. null: level 0 as it is, whatever its mpp (plain images)."""
    mpp_tolerance: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """A level whose mpp is within this share of the target is used unchanged; else a finer one is resized."""
    default_mpp: Annotated[float, Field(gt=0)] | None = None
    """Level-0 mpp of slides that state none and have no override in the cohort. null: they are rejected."""
    overlap_px: Annotated[int, Field(ge=0)] = 0
    """Overlap of neighbouring patches, in px at `mpp`."""
    tissue: Literal["otsu", "none"] = "otsu"
    """otsu: Otsu's threshold on the saturation of a thumbnail. none: every patch counts as tissue."""
    min_tissue: Fraction = 0.25
    """Share of a patch's area that must be tissue."""
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 90
    """Quality of re-encoded patches (4:4:4)."""
    max_bad_slides: Annotated[int, Field(ge=0)] | None = None
    """Quarantined slides tolerated (execution). null: 5% of the cohort, at least one."""
    max_bad_tiles: Fraction = 0.05
    """Share of a slide's patches that may fail to decode before the slide is quarantined."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one tiling task (execution)."""

    @model_validator(mode="after")
    def _overlap(self) -> TilingConfig:
        if self.overlap_px >= self.patch_px:
            raise ValueError(f"overlap_px={self.overlap_px} must be smaller than patch_px={self.patch_px}")
        return self

    def fingerprint(self) -> str:
        """Key of the patch store."""
        spec = self.model_dump(exclude={"max_bad_slides", "cpus"})
        return fingerprint({"schema": SCHEMA_VERSION, "tiling": spec})


class TaskConfig(Section):
    """One thing to predict for each slide, from one column of the cohort."""

    name: Name
    column: str
    kind: Literal["binary", "multiclass"] = "binary"
    classes: tuple[str, ...] = ("0", "1")
    """Label values as the cohort spells them; for a binary task the second is the positive one."""

    @model_validator(mode="after")
    def _classes(self) -> TaskConfig:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)} name one value twice")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has 2 classes, not {len(self.classes)}; use kind: multiclass")
        if len(self.classes) < 2:
            raise ValueError("a multiclass task has at least 2 classes")
        return self


class EncoderConfig(Section):
    """The patch encoder."""

    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    stages: Literal[2, 4] = 4
    """Residual stages kept; 2 is the paper's Megapixel-MNIST trunk (paper section 4)."""
    weights: str | None = None
    """URI of a .safetensors or .pth state dict with torchvision's key names. null: from scratch."""


class AggregatorConfig(Section):
    """The pooling transformer (paper section 3)."""

    heads: Positive = 8
    key_dim: Positive = 16
    """Width of one head's keys and values."""
    hidden_dim: Positive = 512
    """Width of the MLP."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class SelectConfig(Section):
    """The selection (paper Algorithm 1)."""

    mode: Literal["exact", "window"] = "exact"
    """exact: softmax over the whole image. window: the official loop, softmax over the M + I pool."""
    memory: Positive = 64
    """M, patches kept an image."""
    chunk: Positive = 256
    """I, patches read at a time; in window mode it changes the result."""


class ModelConfig(Section):
    """The network."""

    encoder: EncoderConfig = EncoderConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    select: SelectConfig = SelectConfig()
    positions: Literal["none", "grid"] = "none"
    """grid: 2-D sinusoids of the patch's grid column and row are added to its embedding."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Normalisation of pixels scaled to 0..1."""


class TrainConfig(Section):
    """The optimisation."""

    epochs: Positive = 20
    batch_size: Positive = 16
    """Slides a step, over all workers."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0
    """Linear warm-up, then a cosine to lr / 1000 (official code)."""
    explore_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start that train on M random patches instead of the highest scored. From scratch and with few
    slides the selection can settle on the wrong patches before the network knows any; then it never sees the right
    ones. 0: the paper."""
    validate_every: Positive = 5
    """Epochs between looks at the validation split; the last epoch always looks."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm. null: no clipping."""
    augment: bool = True
    """Flips and right-angle turns, the same in scoring and in the gradient pass."""
    score_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the selection pass."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision (autocast) of the gradient pass."""

    @model_validator(mode="after")
    def _warmup(self) -> TrainConfig:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} exceeds epochs={self.epochs}; lower it")
        if self.explore_epochs >= self.epochs:
            raise ValueError(f"explore_epochs={self.explore_epochs} leaves no epoch of {self.epochs} to select in")
        return self


class EvaluateConfig(Section):
    """The test."""

    split: Literal["train", "val", "test"] = "test"
    bootstrap: Positive = 1000
    """Resamples (of patients) behind the confidence interval."""


class TrackingConfig(Section):
    """MLflow (execution, but for the model's name and registry, where a model is registered anew)."""

    uri: str | None = None
    """Tracking server. null: an SQLite file `mlflow.db` beside the run."""
    experiment: str | None = None
    """Default: the config's name."""
    model: str | None = None
    """Name in the model registry. Default: the config's name."""


class ClusterConfig(Section):
    """Ray (execution, but for `workers`, which fixes the order of the sums)."""

    address: str | None = None
    """`auto` or ray://host:port. null: the Ray job's cluster inside a job, else a local one."""
    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 2.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    start_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long to wait for the asked-for resources before giving up with exit code 5."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of the training workers after a crash."""


class Config(Section):
    """The whole configuration of one recipe."""

    name: Name
    """Names the runs, the experiment and the registered model."""
    seed: int = 0
    storage: StorageConfig = StorageConfig()
    cohort: CohortConfig
    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    tiling: TilingConfig = TilingConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _tasks(self) -> Config:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: names must differ, found {names}")
        return self

    def recipe(self) -> dict[str, Any]:
        """What determines the trained model, as plain data."""
        dump = self.model_dump(mode="json", include={"seed", "tasks", "model", "train"})
        return {**dump, "workers": self.cluster.workers, "split": self.cohort.split.model_dump()}
