"""The sections that say which slides, how they become patches, and what is to be predicted of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config_base import Fraction, Name, Section, fingerprint
from pipeline.schema import SCHEMA_VERSION


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
