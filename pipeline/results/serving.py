"""The registered model as MLflow serves it: slide URIs in, predictions out.

MLflow runs this file when the model is loaded ("models from code"). S3 credentials and endpoint come from the
serving host's AWS_* environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.cohort.table import CohortSlide
from pipeline.errors import SlideError, StorageError
from pipeline.inference.prediction import load_model, predict_slide, unpredicted
from pipeline.storage.files import absolute


class SlideModel(PythonModel):
    """DataFrame(uri[, mpp, series]) -> DataFrame(uri, <task>_<output> ..., error), row by row in the given order.

    `mpp` is microns per level-0 px, over what a slide's file states; `series` the number of a file's image. A slide
    that cannot be used has outputs NaN and its reason in `error`; the others are predicted.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; called once."""
        self.model, self.config = load_model(Path(context.artifacts["weights"]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a slide."""
        given = model_input.reindex(columns=["uri", "mpp", "series"])
        rows = [self._row(uri, mpp, series) for uri, mpp, series in given.itertuples(index=False)]
        names = [column for task in self.config.tasks for column in task.output_columns]
        return pd.DataFrame(rows, columns=["uri", *names, "error"])

    def _row(self, uri: str | None, mpp: float | None, series: float | None) -> dict[str, Any]:
        if pd.isna(uri):
            return {"uri": uri, "error": "uri is missing; give a path or an s3:// URI"}
        if not pd.isna(series) and not (series >= 0 and float(series).is_integer()):
            return {"uri": uri, "error": f"series {series:g} is no whole number from 0"}
        image = None if pd.isna(series) else int(series)
        try:
            slide = CohortSlide(uri, absolute(uri), uri, None, None if pd.isna(mpp) else mpp, {}, {}, series=image)
            found = predict_slide(self.model, self.config, slide)
        except SlideError as error:
            return {"uri": uri, "error": unpredicted(error, "in the column mpp")}
        except StorageError as error:
            return {"uri": uri, "error": str(error)}
        values = {
            column: value
            for task in self.config.tasks
            for column, value in zip(task.output_columns, found.values[task.name].tolist(), strict=True)
        }
        return {"uri": uri, **values, "error": None}


set_model(SlideModel())
