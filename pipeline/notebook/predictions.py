"""`predict` for notebooks: the same tables and pictures as the command's, as objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.datasets.batch import picture_html
from pipeline.errors import StageError
from pipeline.notebook.html import table_html
from pipeline.notebook.stages import Run

_SHOWN = 20  # slides of the table
_PICTURES = 4
_UNTOLD = frozenset({"uri", "folder", "n_bad_tiles", "status"})


@dataclass(frozen=True)
class Predictions:
    """What `predict` wrote into a folder."""

    model: str
    """The exact version, or the folder."""
    folder: Path
    failed: Mapping[str, str]
    """Slide id -> why it has no prediction."""

    @cached_property
    def table(self) -> pa.Table:
        """One row a slide: its probabilities, or why there are none."""
        return pq.read_table(self.folder / "predictions.parquet")

    def attention(self, slide_id: str) -> pa.Table:
        """Of every patch of a slide: its place, attention and effects, with what they mean in the schema's metadata.

        Raises:
            StageError: the slide has no prediction here.
        """
        return pq.read_table(self._folder_of(slide_id) / "attention.parquet")

    def heatmap(self, slide_id: str) -> Image.Image:
        """Attention over the slide's thumbnail; errors as of `attention`."""
        with Image.open(self._folder_of(slide_id) / "overlay.png") as image:
            return image.copy()

    def _folder_of(self, slide_id: str) -> Path:
        known = [one for one in self.table["slide_id"].to_pylist() if one not in self.failed]
        if slide_id not in known:
            why = self.failed.get(slide_id, f"it was not asked for; there are {', '.join(known[:_SHOWN])}")
            raise StageError(f"{self.folder}: no prediction of {slide_id!r}: {why}")
        place = self.table["slide_id"].to_pylist().index(slide_id)
        return self.folder / str(self.table["folder"][place].as_py())

    def _repr_html_(self) -> str:
        told = [name for name in self.table.column_names if name not in _UNTOLD]
        rows = self.table.select(told).slice(0, _SHOWN).to_pylist()
        good = [row["slide_id"] for row in rows if row["error"] is None][:_PICTURES]
        pictures = "".join(f"<span>{picture_html(self.heatmap(slide_id))}</span>" for slide_id in good)
        head = f"<p>{len(self.table)} slides by {escape(self.model)}, {len(self.failed)} without prediction</p>"
        return f"<div>{head}{table_html(told, [list(row.values()) for row in rows])}{pictures}</div>"


def predict(
    model: str | Run,
    slides: str | Path | Sequence[str | Path] = (),
    *,
    cohort: str | None = None,
    out: str | Path = "predictions",
    tracking_uri: str | None = None,
    mpp: float | None = None,
    series: int | None = None,
) -> Predictions:
    """Predict slides with a trained model: probabilities, and of each slide what its patches count for.

    Args:
        model: what `run` returned, `models:/NAME@champion`, `models:/NAME/VERSION`, or the folder of a checkpoint.
        slides: one or several paths or URIs, of slides or of folders of them.
        cohort: URI of a cohort file, whose slides are predicted too; labels are not needed.
        out: local folder for the files, made where there is none.
        tracking_uri: where the model is registered. Default: the run's, else MLFLOW_TRACKING_URI, else ./mlflow.db.
        mpp: microns per px at full resolution of `slides`, whatever their files state.
        series: which image of each of the `slides`' files, where they hold several that could be meant.

    Raises:
        StageError: nothing to predict, or no slide at all could be predicted (the tables are written).
        TrackingError: the model is not found or cannot be fetched.
    """
    from pipeline.predictions.run import predict as write_predictions

    if isinstance(model, Run):
        if model.model is None:
            raise StageError(f"{model.config.name}: nothing is trained yet; run(config) goes on to the model")
        tracking_uri = tracking_uri or model.config.tracking.uri
        model = model.model
    registry = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    uris = [slides] if isinstance(slides, str | Path) else slides
    folder = Path(out).absolute()
    done = write_predictions(
        model, [str(uri) for uri in uris], cohort, folder, tracking_uri=registry, mpp=mpp, series=series
    )
    return Predictions(done["model"], folder, done["failed"])
