"""The sections that say which slides, how they become patches, and what is to be predicted of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import Fraction, Name, Positive, Section, Seed, fingerprint
from pipeline.config.tissue import TissueModelConfig
from pipeline.schema import SCHEMA_VERSION

Weight = Annotated[float, Field(gt=0)]

CONTEXT_TIMES = 2.0, 16.0
"""Least and most that `tiling.context_mpp` is of `tiling.mpp`."""

SLIDE_COLUMNS = ("slide_id", "uri", "patient_id", "n_patches", "n_bad_tiles", "error")
"""What tables of predictions say of a slide itself, whatever is predicted."""


_LATER = frozenset({"min_sharpness", "context_mpp", "tissue_model"})
"""Fields of the tiling that came after schema 6: where they are not set, stores of before keep their key."""


class DemoConfig(Section):
    """The synthetic cohort that `pipeline demo` writes. Read when it is written; a cohort that is there stays."""

    slides: Annotated[int, Field(ge=12)] = 160
    seed: Seed = 0


class MegapixelConfig(Section):
    """The paper's Megapixel MNIST (section 4.1), whose images are generated: the official script's settings."""

    folder: str
    """Folder or s3:// prefix of the four MNIST idx files, gzipped or not (execution: their content counts)."""
    train: Positive = 5000
    """Images of the split `train`, from MNIST's training digits."""
    test: Positive = 1000
    """Images of the split `test`, from MNIST's test digits."""
    width: Annotated[int, Field(ge=140)] = 1500
    """Of an image, in px; on 140 x 140 px five digits always find places."""
    height: Annotated[int, Field(ge=140)] = 1500
    strokes: Annotated[int, Field(ge=0)] = 50
    """Noise strokes on an image, and different ones there are."""
    seed: Seed = 0


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
    """CSV or Parquet with columns slide_id, uri, those of the labels, and optionally patient_id, split, mpp, mask,
    coords, series and features. Other columns part the report's results into groups (`results.strata`)."""
    features: str | None = None
    """Folder or s3:// prefix of TRIDENT's, CLAM's or STAMP's feature files (`<slide>.h5`, or tensors as `<slide>.pt`),
    one for every slide without `features` in the cohort: with `model.encoder.name: features` and no `embed`, models
    learn from these, and no slide is opened. The place is execution; the files' content enters each slide's key."""
    bag: Literal["slide", "patient"] = "slide"
    """patient: all slides of a patient form one bag, with one label and one prediction; their labels must agree."""
    specimen: str | None = None
    """Column of the cohort that says which of a patient's specimens (blocks, organs, operations) a slide is of: with
    `bag: patient` those of one form a bag, and there is a label and a prediction for each. Patients still decide the
    splits and the intervals. null: a patient's slides are one specimen."""
    split: SplitConfig = SplitConfig()
    demo: DemoConfig | None = None
    """Set: the cohort is the synthetic one and is written to `uri`'s folder when it is absent."""
    megapixel_mnist: MegapixelConfig | None = None
    """Set: the cohort is generated, written to `uri`, and its images are drawn when their patches are asked for."""

    @model_validator(mode="after")
    def _one_cohort(self) -> CohortConfig:
        if self.demo is not None and self.megapixel_mnist is not None:
            raise ValueError("demo and megapixel_mnist are two cohorts; remove one")
        return self

    @property
    def whole(self) -> str:
        """What a bag of several slides is."""
        return "patient" if self.specimen is None else "specimen"

    @property
    def grouping(self) -> tuple[str, ...]:
        """Columns of a served model's rows by which they are one bag; none where each is."""
        if self.bag == "slide":
            return ()
        return ("patient",) if self.specimen is None else ("patient", "specimen")


class TilingConfig(Section):
    """How a slide becomes patches. The fingerprint of this section is the patch store's key."""

    patch_px: Annotated[int, Field(ge=8, le=4096)] | Literal["native"] = 256
    """Edge of a patch, in px, at `mpp`. native: that of the tiles that the slide itself is cut into, so that patches
    keep their bytes (see `codec`); slides that are trained on together must then agree in it."""
    mpp: Annotated[float, Field(gt=0)] | None = 0.5
    """Microns per px of a patch. null: level 0 as it is, whatever its mpp, and square or not (plain images)."""
    context_mpp: Annotated[float, Field(gt=0)] | None = None
    """Microns per px of a second picture of each patch: as many px around the same centre, so of a larger place, for
    the encoder to see both (`model.encoder`). Twice to 16 times `mpp`. null: there is none."""
    mpp_tolerance: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """A level whose mpp is within this share of the target is used unchanged; else a finer one is resized."""
    default_mpp: Annotated[float, Field(gt=0)] | None = None
    """Level-0 mpp of slides that state none and have no override in the cohort. null: they are rejected."""
    overlap_px: Annotated[int, Field(ge=0)] = 0
    """Overlap of neighbouring patches, in px at `mpp`."""
    edge: Literal["inside", "pad", "drop"] = "inside"
    """What becomes of the last column and row, where the slide does not end with a patch. inside: they are shifted
    inwards and end where the slide does, over a part of the ones before. pad: they reach over its edge, where they show
    background; slides smaller than a patch are padded with `inside` too. drop: there are none, which loses the tissue
    there; its share is in `slide.json`, the ledger and the quality page."""
    tissue: Literal["otsu", "model", "none"] = "otsu"
    """otsu: Otsu's threshold on the saturation of a thumbnail. model: what a network says (`tissue_model`). none: every
    patch counts as tissue. A slide whose cohort row names a `mask` takes that instead."""
    tissue_model: TissueModelConfig | None = None
    """The network, for `tissue: model`."""
    artefacts: Literal["remove", "keep"] = "remove"
    """remove: ink by its hue, and colour without texture (tinted glass, blurred dust), is no tissue. For
    `tissue: otsu`."""
    tissue_threshold: Annotated[float, Field(gt=0, lt=255)] | None = None
    """Saturation above which a px of the thumbnail is tissue, of 255; what is fainter is then none. null: Otsu's, kept
    in 12 to 30, which the quality page shows of each slide, and faint px around those. For `tissue: otsu`."""
    tissue_closing_px: Annotated[int, Field(ge=0)] = 0
    """Gaps in the tissue narrower than this are tissue too (morphological closing), in px at `mpp`: fat cells are 50 to
    150 microns wide, of which the mask shows the walls alone. 0: none are. For `tissue: otsu`."""
    min_tissue: Fraction = 0.25
    """Share of a patch's area that must be tissue; of what lies on the slide, where a patch reaches over its edge."""
    codec: Literal["checked", "original", "encoded"] = "checked"
    """checked: a patch that is exactly one JPEG tile of the slide keeps the slide's own bytes, and is lost where they
    cannot be decoded; all others are encoded anew. original: such tiles are not decoded, which is faster by what that
    takes; damage within their compressed data is then found only where it is plain to see, and else stops the training
    that meets it. encoded: every patch is decoded and encoded anew."""
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 90
    """Quality of re-encoded patches (4:4:4)."""
    min_sharpness: Annotated[float, Field(ge=0)] | None = None
    """Variance of the Laplacian below which a patch is out of focus and no patch, counted as `blurred`
    (`tiling.sharpness`). 0: it is measured, kept beside each patch and shown on the quality page, and none is left out.
    null: it is not measured. What is usual differs with stain, scanner, JPEG quality and `mpp`: measure first."""
    max_bad_slides: Annotated[int, Field(ge=0)] | None = None
    """Quarantined slides tolerated (execution). null: 5% of the cohort, at least one."""
    max_bad_tiles: Fraction = 0.05
    """Share of a slide's patches that may fail to decode before the slide is quarantined."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one tiling task (execution)."""
    max_seconds: Annotated[float, Field(gt=0)] = 1200.0
    """Seconds of CPU time that a slide's reading may take before it is quarantined as too-expensive: planning it, with
    all its patches where they are fewer than some 12,000 of 256 px, and else each share of some 8,000. Such a share
    takes 9 s (execution: a later run that allows more tries again). Where no patches are kept (`train.source: stream`,
    `predict` without a store) a slide is only planned; with `min_sharpness` all its patches, however many, are cut and
    measured for that within the limit."""
    max_slide_gib: Annotated[float, Field(gt=0)] = 2.0
    """GiB of memory that the process which reads a slide may hold before the slide is quarantined as too-expensive; it
    holds 0.1 without one (execution, as `max_seconds`)."""
    cache: str | None = None
    """Folder on each node for copies of slides on S3 that cannot be read where they lie (execution). null: below the
    system's folder for temporary files."""
    cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """GiB that those copies may take on a node; the least recently used go first (execution)."""
    coords: str | None = None
    """Folder or s3:// prefix of TRIDENT's (`<slide>_patches.h5`) or CLAM's (`<slide>.h5`) coordinate files, one for
    every slide without `coords` in the cohort: their patches are cut, and no tissue is looked for. The place is
    execution; the files' content enters each slide's key."""

    @model_validator(mode="after")
    def _overlap(self) -> TilingConfig:
        if self.patch_px != "native" and self.overlap_px >= self.patch_px:
            raise ValueError(f"overlap_px={self.overlap_px} must be smaller than patch_px={self.patch_px}")
        return self

    @model_validator(mode="after")
    def _context(self) -> TilingConfig:
        if self.context_mpp is None:
            return self
        if self.mpp is None:
            raise ValueError("context_mpp says how much coarser than mpp a second picture is; set tiling.mpp")
        low, high = (self.mpp * times for times in CONTEXT_TIMES)
        if not low <= self.context_mpp <= high:
            raise ValueError(
                f"context_mpp={self.context_mpp:g} must be {low:g} to {high:g}, twice to 16 times mpp={self.mpp:g}"
            )
        return self

    @model_validator(mode="after")
    def _network(self) -> TilingConfig:
        if (self.tissue == "model") != (self.tissue_model is not None):
            raise ValueError(
                "tissue=model and tissue_model go together: that a network finds tissue, and which; set both or none"
            )
        if self.tissue == "model" and self.mpp is None:
            raise ValueError("tissue=model needs mpp: where level 0 is taken as it is, the network's px are not known")
        return self

    @property
    def edge_px(self) -> int:
        """`patch_px` where it is a number, or has become one (`tiling.with_native_edge`)."""
        if self.patch_px == "native":
            raise ValueError("tiling.patch_px=native needs slides of tiles; give a number here")
        return self.patch_px

    def fingerprint(self) -> str:
        """Key of the patch store."""
        return fingerprint({"schema": SCHEMA_VERSION, "tiling": self.identity()})

    def identity(self) -> dict[str, Any]:
        """What decides the patches, as plain data."""
        execution = {"max_bad_slides", "cpus", "max_seconds", "max_slide_gib", "cache", "cache_gib", "coords"}
        known = self.model_dump(mode="json", exclude=execution | {"tissue_model"})
        known["tissue_model"] = None if self.tissue_model is None else self.tissue_model.identity()
        return {name: value for name, value in known.items() if name not in _LATER or value is not None}


class TaskConfig(Section):
    """One thing to predict for each slide. A slide may lack the label of one task and have that of another."""

    name: Name
    column: str
    """Column of the cohort. multilabel: the labels that hold, with `;` between them, and `-` where none does;
    regression: a number; survival: the time until the event, or until the patient was last seen without it."""
    kind: Literal["binary", "multiclass", "multilabel", "regression", "survival"] = "binary"
    classes: tuple[str, ...] = ("0", "1")
    """Label values as the cohort spells them; for a binary task the second is the positive one. Regression and
    survival have none. Numbers are taken as text. [no, yes] of a binary task, which YAML reads as truth values, become
    false and true, and the cohort may write no, yes, false, true, off, on, 0 or 1 (`cohort.labels`)."""
    class_weights: Annotated[tuple[Weight, ...], Field(min_length=2)] | Literal["balanced"] | None = None
    """Weight of each class in the loss, for binary and multiclass tasks. balanced: n / (K n_k), from the n training
    slides with a label, n_k of class k of K. null: all 1."""
    event_column: str | None = None
    """survival: the column that says whether the event was seen (1) or the patient was censored (0)."""
    bins: tuple[Weight, ...] = ()
    """survival: ends of the time bins, ascending, in the unit of `column`. A bin holds its end, the first one starts
    at 0, and whatever comes after the last one counts as survived."""
    mean: float = 0.0
    """regression: the head predicts (value - mean) / std; predictions and errors are in the column's unit."""
    std: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("classes", mode="before")
    @classmethod
    def _spelled(cls, value: Any, info: ValidationInfo) -> Any:
        """What YAML made numbers or truth values of, as text."""
        if not isinstance(value, list | tuple):
            return value
        truths = [name for name in value if isinstance(name, bool)]
        if truths and not (info.data.get("kind") == "binary" and len(value) == 2 and set(truths) == {False, True}):
            raise ValueError(
                "YAML reads yes, no, on, off, true and false as truth values; put such classes into quotes, as in "
                '["yes", "no"]'
            )
        return [str(name).lower() if isinstance(name, bool | int | float) else name for name in value]

    @model_validator(mode="before")
    @classmethod
    def _without_classes(cls, data: Any) -> Any:
        plain = isinstance(data, dict) and data.get("kind") in ("regression", "survival") and "classes" not in data
        return {**data, "classes": ()} if plain else data

    @model_validator(mode="after")
    def _classes(self) -> TaskConfig:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {list(self.classes)} name one value twice")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has 2 classes, not {len(self.classes)}; use kind: multiclass")
        if self.kind == "multiclass" and len(self.classes) < 2:
            raise ValueError("a multiclass task has at least 2 classes")
        if self.kind in ("regression", "survival") and self.classes:
            raise ValueError(f"a {self.kind} task has no classes; remove them")
        if self.kind == "multilabel":
            odd = [name for name in self.classes if ";" in name or name.strip() in ("", "-")]
            if odd or not self.classes:
                raise ValueError(f"classes {list(self.classes)}: labels are words without ';', and '-' means none")
        return self

    @model_validator(mode="after")
    def _what_only_some_kinds_have(self) -> TaskConfig:
        if self.class_weights is not None and self.kind not in ("binary", "multiclass"):
            raise ValueError(f"class_weights: only binary and multiclass tasks take them, not {self.kind}")
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(self.classes):
            raise ValueError(f"class_weights has {len(self.class_weights)} weights for {len(self.classes)} classes")
        if self.kind == "survival" and (self.event_column is None or not self.bins):
            raise ValueError("a survival task needs event_column and bins; set both")
        if self.kind != "survival" and (self.event_column is not None or self.bins):
            raise ValueError(f"event_column and bins belong to survival tasks, not to {self.kind}; remove them")
        if any(after <= before for before, after in pairwise(self.bins)):
            raise ValueError(f"bins {list(self.bins)} must ascend")
        if self.kind != "regression" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(f"mean and std scale the values of a regression task; a {self.kind} task has none")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that its label is read from."""
        return (self.column,) if self.event_column is None else (self.column, self.event_column)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What each number of a prediction is called: the classes; `value`; or the end of each time bin."""
        if self.kind == "regression":
            return ("value",)
        return tuple(f"{end:g}" for end in self.bins) if self.kind == "survival" else self.classes

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Columns of a prediction, one for each of `outputs`."""
        return tuple(f"{self.name}_{output}" for output in self.outputs)

    @property
    def result_columns(self) -> dict[str, str]:
        """Columns of an evaluation beside those: the true label and what is predicted of it, by what they hold."""
        return {"label": f"{self.name}_label", "prediction": f"{self.name}_predicted"}
