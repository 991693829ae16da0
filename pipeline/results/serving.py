"""The registered model as MLflow serves it: slide URIs in, predictions out.

MLflow runs this file when the model is loaded ("models from code"). S3 credentials and endpoint come from the
serving host's AWS_* environment, and so does what it may be asked for (`limits`).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.cohort.table import CohortSlide
from pipeline.credentials import masked_value
from pipeline.errors import SlideError, StorageError
from pipeline.inference.prediction import load_model, predict_slide, unpredicted
from pipeline.results.limits import ROWS, SECONDS, Limits, host_limits


class SlideModel(PythonModel):
    """DataFrame(uri[, mpp, series]) -> DataFrame(uri, <task>_<output> ..., error), row by row in the given order.

    `mpp` is microns per level-0 px, over what a slide's file states; `series` the number of a file's image. A slide
    that cannot be used has None for outputs and its reason in `error`; the others are predicted, and their `error` is
    None. None is JSON's null, where NaN would be no JSON at all. A URI with a credential is refused, and comes back
    masked.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; called once. ConfigError where the host's limits are no limits."""
        host_limits()
        self.model, self.config = load_model(Path(context.artifacts["weights"]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a slide; MlflowException (HTTP 400) where there are more than the host allows."""
        limits, began = host_limits(), time.monotonic()
        if len(model_input) > limits.rows:
            raise MlflowException.invalid_parameter_value(
                f"{len(model_input)} slides in one request, and {limits.rows:g} are allowed ({ROWS}); send fewer"
            )
        rows: list[dict[str, Any]] = []
        for uri, mpp, series in model_input.reindex(columns=["uri", "mpp", "series"]).itertuples(index=False):
            late = bool(rows) and time.monotonic() - began > limits.seconds  # the first is always begun
            rows.append(self._failed(uri, _late(limits)) if late else self._row(uri, mpp, series, limits))
        return pd.DataFrame(rows, columns=["uri", *self._outputs(), "error"], dtype=object)

    def _outputs(self) -> list[str]:
        return [column for task in self.config.tasks for column in task.output_columns]

    def _failed(self, uri: object, error: str) -> dict[str, Any]:
        shown = masked_value(uri) if isinstance(uri, str) else None
        return {"uri": shown, **dict.fromkeys(self._outputs()), "error": error}

    def _row(self, uri: object, mpp: float | None, series: float | None, limits: Limits) -> dict[str, Any]:
        if not isinstance(uri, str):
            return self._failed(None, "uri is missing; give a path or an s3:// URI")
        if not pd.isna(series) and not (series >= 0 and float(series).is_integer()):
            return self._failed(uri, f"series {series:g} is no whole number from 0")
        image, microns = None if pd.isna(series) else int(series), None if pd.isna(mpp) else mpp
        try:
            slide = CohortSlide(uri, limits.admit(uri), uri, None, microns, {}, {}, series=image)
            found = predict_slide(self.model, self.config, slide)
        except SlideError as error:
            return self._failed(uri, unpredicted(error, "in the column mpp"))
        except StorageError as error:
            return self._failed(uri, str(error))
        numbers = [value for task in self.config.tasks for value in found.values[task.name].tolist()]
        if not all(map(math.isfinite, numbers)):
            return self._failed(uri, f"the model gives {numbers}, no finite numbers; its weights are no good")
        return {"uri": uri, **dict(zip(self._outputs(), numbers, strict=True)), "error": None}


def _late(limits: Limits) -> str:
    return (
        f"not begun: the slides before it took the {limits.seconds:g} s of a request ({SECONDS}); send fewer at a time"
    )


set_model(SlideModel())
