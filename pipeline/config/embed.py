"""The section that says which frozen network turns patches into stored features."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Positive, Section, fingerprint
from pipeline.config.encoders import with_statistics
from pipeline.config.model import EncoderConfig

FEATURE_VERSION = 2  # of a feature store's layout; part of its key


class EmbedConfig(Section):
    """The features that `model.encoder.name: features` trains on. With the tiling it names the feature store."""

    encoder: EncoderConfig = EncoderConfig(name="resnet50")
    """The network, frozen; `weights` should be pretrained ones."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.229, 0.224, 0.225)
    """Normalisation of pixels scaled to 0..1, a value a channel."""
    dtype: Literal["float16", "float32"] = "float16"
    """As the features are stored."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision (autocast) of the network."""
    batch: Positive = 128
    """Patches a pass (execution, but for the rounding of another kernel)."""

    @model_validator(mode="before")
    @classmethod
    def _statistics(cls, data: Any) -> Any:
        return with_statistics(data)

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if self.encoder.name == "features":
            raise ValueError("encoder.name: features are what is made here; name a network, as in resnet50")
        if not len(self.mean) == len(self.std) == self.encoder.channels == 3:
            raise ValueError("mean and std need three values, and encoder.channels must be 3: patches are RGB")
        return self

    def fingerprint(self, weights: str | None) -> str:
        """Second half of the feature store's key; `weights` is the digest of the weights' content."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude={"batch": True, "encoder": {"weights"}})
        return fingerprint({"version": FEATURE_VERSION, "weights": weights, **plain})
