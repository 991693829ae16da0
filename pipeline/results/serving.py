"""The registered model as MLflow serves it: slide URIs in, predictions out.

MLflow runs this file when the model is loaded ("models from code"). S3 credentials and endpoint come from the
serving host's AWS_* environment, and so does what it may be asked for (`limits`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.cohort.table import CohortSlide
from pipeline.credentials import masked_value
from pipeline.errors import SlideError, StorageError
from pipeline.inference.ensemble import load_members, predict_mean
from pipeline.inference.explain import explain
from pipeline.inference.metrics import Floats
from pipeline.inference.prediction import SlidePrediction, load_model, predict_slide, unpredicted
from pipeline.model.folder import MEMBERS
from pipeline.results.limits import ROWS, SECONDS, Limits, host_limits


class SlideModel(PythonModel):
    """DataFrame(uri[, mpp, series]) -> DataFrame(uri, <task>_<output> ..., error), row by row in the given order.

    `mpp` is microns per level-0 px, over what a slide's file states; `series` the number of a file's image. A slide
    that cannot be used has None for outputs and its reason in `error`; the others are predicted, and their `error` is
    None. None is JSON's null, where NaN would be no JSON at all. A URI with a credential is refused, and comes back
    masked. What `params` ask for are further columns (`_maps`). An ensemble gives the mean of its models' outputs, from
    one reading of each slide, and null in those columns.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; called once. ConfigError where the host's limits are no limits."""
        host_limits()
        if MEMBERS in context.artifacts:
            self.members = load_members(Path(context.artifacts[MEMBERS]))
        else:
            self.members = [load_model(Path(context.artifacts["weights"]).parent)]
        self.model, self.config = self.members[0]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a slide; MlflowException (HTTP 400) where there are more than the host allows, or odd `params`."""
        limits, began, asked = host_limits(), time.monotonic(), _asked(params or {})
        if len(model_input) > limits.rows:
            raise MlflowException.invalid_parameter_value(
                f"{len(model_input)} slides in one request, and {limits.rows:g} are allowed ({ROWS}); send fewer"
            )
        rows: list[dict[str, Any]] = []
        for uri, mpp, series in model_input.reindex(columns=["uri", "mpp", "series"]).itertuples(index=False):
            late = bool(rows) and time.monotonic() - began > limits.seconds  # the first is always begun
            rows.append(self._failed(uri, _late(limits)) if late else self._row(uri, mpp, series, limits, asked))
        columns = ["uri", *self._outputs(), *asked.columns, "error"]
        return pd.DataFrame([{**dict.fromkeys(columns), **row} for row in rows], columns=columns, dtype=object)

    def _outputs(self) -> list[str]:
        return [column for task in self.config.tasks for column in task.output_columns]

    def _failed(self, uri: object, error: str) -> dict[str, Any]:
        return {"uri": masked_value(uri) if isinstance(uri, str) else None, "error": error}

    def _row(
        self, uri: object, mpp: float | None, series: float | None, limits: Limits, asked: Asked
    ) -> dict[str, Any]:
        if not isinstance(uri, str):
            return self._failed(None, "uri is missing; give a path or an s3:// URI")
        if not pd.isna(series) and not (series >= 0 and float(series).is_integer()):
            return self._failed(uri, f"series {series:g} is no whole number from 0")
        image, microns = None if pd.isna(series) else int(series), None if pd.isna(mpp) else mpp
        try:
            slide = CohortSlide(uri, limits.admit(uri), uri, None, microns, {}, {}, series=image)
            values, maps = self._found(slide, asked)
        except SlideError as error:
            return self._failed(uri, unpredicted(error, "in the column mpp"))
        except StorageError as error:
            return self._failed(uri, str(error))
        numbers = [value for task in self.config.tasks for value in values[task.name].tolist()]
        if not all(map(math.isfinite, numbers)):
            return self._failed(uri, f"the model gives {numbers}, no finite numbers; its weights are no good")
        outputs = dict(zip(self._outputs(), numbers, strict=True))
        return {"uri": uri, **outputs, **maps, "error": None}

    def _found(self, slide: CohortSlide, asked: Asked) -> tuple[Mapping[str, Floats], dict[str, Any]]:
        """Outputs of a slide and its maps; of several models the mean, which has none."""
        if len(self.members) > 1:
            return predict_mean(self.members, slide), {}
        found = predict_slide(self.model, self.config, slide, pooled=asked.explain)
        return found.values, self._maps(found, asked)

    def _maps(self, found: SlidePrediction, asked: Asked) -> dict[str, Any]:
        """What is asked for beside the outputs.

        attention: `patches`, columns of x, y (level-0 px), attention and, if explained, effects, in the order of rows.
        top_k: `top`, so many of these patches, the most attended first. Both with `patch`, their edge in level-0 px.
        explain: effects in either, and `curves` (`inference.explain`); null of a model whose pool does not tell.
        """
        if not asked.columns:
            return {}
        said = explain(self.model, self.config.tasks, found.found, found.key) if asked.explain else None
        maps = {name: found.attention[name].to_numpy() for name in ("x", "y", "attention")}
        if said is not None:
            maps |= {f"effect_{name}": values for name, values in said.effect.items()}
        best = np.argsort(-maps["attention"], kind="stable")[: asked.top_k]
        top = [{"row": int(row), **{name: values[row].item() for name, values in maps.items()}} for row in best]
        made = {
            "patch": found.extent,
            "patches": {name: values.tolist() for name, values in maps.items()} if asked.attention else None,
            "top": top,
            "curves": None if said is None else said.curves,
        }
        return {name: made[name] for name in asked.columns}


@dataclass(frozen=True)
class Asked:
    """The `params` of a request."""

    attention: bool
    top_k: int
    explain: bool

    @property
    def columns(self) -> list[str]:
        """That the answer has for them."""
        found = [("patches", self.attention), ("top", self.top_k > 0), ("curves", self.explain)]
        names = [name for name, wanted in found if wanted]
        return ["patch", *names] if names else []


def _asked(params: Mapping[str, Any]) -> Asked:
    asked = Asked(bool(params.get("attention")), int(params.get("top_k") or 0), bool(params.get("explain")))
    if asked.top_k < 0:
        raise MlflowException.invalid_parameter_value(f"top_k is {asked.top_k}; give a number from 0")
    return asked


def _late(limits: Limits) -> str:
    return (
        f"not begun: the slides before it took the {limits.seconds:g} s of a request ({SECONDS}); send fewer at a time"
    )


set_model(SlideModel())
