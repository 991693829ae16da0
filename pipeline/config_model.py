"""The sections that say what the network is and how it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config_base import Positive, Section


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
