"""The section that says which network finds the tissue of slides."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Section

_Scale = Annotated[float, Field(gt=0)]


class TissueModelConfig(Section):
    """A network that says of every px what it is, for `tiling.tissue: model`. All but its place is in the key."""

    uri: str
    """File of the network, TorchScript or ONNX, from a picture (1, 3, tile, tile) to a value for each class and px (1,
    classes, tile, tile) (execution: its content counts). Either is a program, which runs where slides are read."""
    sha256: Annotated[str, Field(validate_default=True)] = ""
    """Of the file, as `sha256sum` prints it, and never without: another file is refused."""
    mpp: Annotated[float, Field(gt=0)]
    """Microns per px of what it sees; slides that are coarser are quarantined."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """What its output channels stand for, in order."""
    tissue: Annotated[tuple[str, ...], Field(min_length=1)]
    """Those of `classes` that are tissue."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability of tissue, of all its classes together, from which a px is tissue. null: where the likeliest class is
    tissue; with one class 0.5."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What it gives: logits become probabilities by a softmax, with one class by a sigmoid. For `threshold`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[_Scale, _Scale, _Scale] = (0.229, 0.224, 0.225)
    """Normalisation of pixels scaled to 0..1, red, green and blue."""
    tile: Annotated[int, Field(ge=32, le=4096)] = 512
    """Edge of the squares that it looks at, px."""
    overlap: Annotated[int, Field(ge=0)] = 64
    """Px along a square's edges that another one judges: at least the network's reach, and a multiple of the px that it
    makes one of inside; `tile` less twice the overlap should be such too."""

    @field_validator("sha256")
    @classmethod
    def _digest(cls, value: str) -> str:
        if re.fullmatch(r"[0-9a-f]{64}", value) is None:
            raise ValueError("give the 64 digits that `sha256sum` prints of the network's file: it is run as a program")
        return value

    @model_validator(mode="after")
    def _named(self) -> TissueModelConfig:
        if len(set(self.classes)) != len(self.classes) or len(set(self.tissue)) != len(self.tissue):
            raise ValueError("classes and tissue name each class once")
        if strange := [name for name in self.tissue if name not in self.classes]:
            raise ValueError(f"tissue: {', '.join(strange)} is none of classes {list(self.classes)}")
        if len(self.tissue) == len(self.classes) > 1:
            raise ValueError("tissue names all classes, so all would be tissue; leave out what is none")
        if 2 * self.overlap >= self.tile:
            raise ValueError(f"overlap={self.overlap} must be less than half of tile={self.tile}")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the mask, as plain data."""
        return self.model_dump(mode="json", exclude={"uri"})
