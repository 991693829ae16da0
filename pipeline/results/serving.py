"""The registered model as MLflow serves it: slide URIs in, predictions out.

MLflow runs this file when the model is loaded ("models from code"). S3 credentials and endpoint come from the
serving host's AWS_* environment, and so does what it may be asked for (`limits`).
"""

from __future__ import annotations

import ast
import logging
import math
import re
import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.cohort.table import CohortSlide
from pipeline.credentials import masked_value
from pipeline.errors import ConfigError, SlideError, StorageError
from pipeline.inference.ensemble import load_members, predict_mean
from pipeline.inference.explain import Explanation, explain
from pipeline.inference.metrics import Floats
from pipeline.inference.prediction import SlidePrediction, load_model, predict_together, unpredicted
from pipeline.model.calibration import end_columns, intervals, read_calibration
from pipeline.model.folder import MEMBERS, Seen, read_seen
from pipeline.results.limits import ROWS, SECONDS, Limits, host_limits

_MLFLOW_LOG = "mlflow.models.utils"
_DROPPED = re.compile(r"Unrecognized params (\[.*\]) are ignored .* Supported params are: (\{.*?\})\.", re.DOTALL)


class SlideModel(PythonModel):
    """DataFrame(uri[, mpp, series]) -> DataFrame(uri, <task>_<output> ..., error), row by row in the given order.

    `mpp` is microns per level-0 px, over what a slide's file states; `series` the number of a file's image. A slide
    that cannot be used has None for outputs and its reason in `error`; the others are predicted, and their `error` is
    None. None is JSON's null, where NaN would be no JSON at all. A URI with a credential is refused, and comes back
    masked. What `params` ask for are further columns (`_maps`); with `intervals` the outputs' `_low` and `_high`, null
    where the model has none (`model.calibration`). An ensemble gives the mean of its models' outputs, from one reading
    of each slide, and null in all of those columns. A model of patients (`cohort.bag`) takes a column `patient`: the
    rows of one are one bag and have the same outputs, each with the maps of its slide; one slide that cannot be used
    fails them all. With `cohort.specimen` so do the rows of one patient and one `specimen`, a further column.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; called once. ConfigError where the host's limits are no limits."""
        host_limits()
        log = logging.getLogger(_MLFLOW_LOG)
        log.setLevel(logging.WARNING)  # else MLFLOW_LOGGING_LEVEL=ERROR would keep what is refused from the filter
        log.addFilter(_refuse_unknown)
        if MEMBERS in context.artifacts:
            self.members, self.cases, self.seen = load_members(Path(context.artifacts[MEMBERS])), {}, None
        else:
            folder = Path(context.artifacts["weights"]).parent
            self.members, self.seen = [load_model(folder)], read_seen(folder)
            self.cases = read_calibration(folder, self.members[0][1].tasks)
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
        given = [_Row(*one) for one in model_input.reindex(columns=_Row._fields).itertuples(index=False)]
        rows: dict[int, dict[str, Any]] = {}
        for group in self._bags(given):
            late = bool(rows) and time.monotonic() - began > limits.seconds  # the first is always begun
            own = [given[number] for number in group]
            found = [self._failed(one, _late(limits)) for one in own] if late else self._rows(own, limits, asked)
            rows |= zip(group, found, strict=True)
        ends = end_columns(self.config.tasks) if asked.intervals else {}
        columns = ["uri", *self._outputs(), *chain.from_iterable(ends.values()), *asked.columns, "error"]
        ordered = [{**dict.fromkeys(columns), **rows[number]} for number in range(len(given))]
        return pd.DataFrame(ordered, columns=columns, dtype=object)

    def _bags(self, given: Sequence[_Row]) -> list[list[int]]:
        """Numbers of the rows that are predicted together: of one patient or specimen, where the model knows them."""
        groups: dict[Hashable, list[int]] = {}
        for number, one in enumerate(given):
            whose = tuple(getattr(one, name) for name in self.config.cohort.grouping)
            alone = not whose or any(map(pd.isna, whose))
            groups.setdefault(number if alone else whose, []).append(number)
        return list(groups.values())

    def _outputs(self) -> list[str]:
        return [column for task in self.config.tasks for column in task.output_columns]

    def _failed(self, row: _Row, error: str) -> dict[str, Any]:
        return {"uri": masked_value(row.uri) if isinstance(row.uri, str) else None, "error": error}

    def _rows(self, given: Sequence[_Row], limits: Limits, asked: Asked) -> list[dict[str, Any]]:
        """The answers to the rows of one bag: the same outputs, or one error."""
        answer = self._answer(given, limits, asked)
        if isinstance(answer, str):
            return [self._failed(one, answer) for one in given]
        outputs = answer.outputs
        if asked.intervals:
            patients = {Seen.patient(str(row.patient)) for row in given if not pd.isna(row.patient)}
            outputs |= self._ends(outputs, answer.keys | patients)
        return [{"uri": one.uri, **outputs, **own, "error": None} for one, own in zip(given, answer.maps, strict=True)]

    def _ends(self, outputs: Mapping[str, float], digests: Collection[str]) -> dict[str, float]:
        """By column, of those outputs that have an interval.

        Without the cases that are of the same slides or patient, whose digests these are; none of what the model has
        learned from (as `predictions.output.with_intervals`).
        """
        if self.seen is not None and self.seen.has(digests):
            return {}
        names, found = end_columns(self.config.tasks), intervals(self.config.tasks, self.cases, outputs, digests)
        return {name: end for column, ends in found.items() for name, end in zip(names[column], ends, strict=True)}

    def _answer(self, given: Sequence[_Row], limits: Limits, asked: Asked) -> _Answer | str:
        """What is said of a bag; or why there is nothing."""
        problem = next(filter(None, map(_problem, given)), None)
        if problem is not None:
            return problem
        try:
            values, keys, maps = self._found([_slide(one, limits) for one in given], asked)
        except SlideError as error:
            return unpredicted(error, "in the column mpp")
        except StorageError as error:
            return str(error)
        except ConfigError as error:  # as of a tissue network that was changed: other rows may need none
            return "; ".join(error.problems)
        numbers = [value for task in self.config.tasks for value in values[task.name].tolist()]
        if not all(map(math.isfinite, numbers)):
            return f"the model gives {numbers}, no finite numbers; its weights are no good"
        return _Answer(dict(zip(self._outputs(), numbers, strict=True)), keys, maps)

    def _found(
        self, slides: Sequence[CohortSlide], asked: Asked
    ) -> tuple[Mapping[str, Floats], frozenset[str], list[dict[str, Any]]]:
        """Values, keys and maps of a bag's slides; of several models the mean, which has no maps and no intervals."""
        if len(self.members) > 1:  # of folds, which take slides alone
            return predict_mean(self.members, slides[0]), frozenset(), [{}]
        found = predict_together(self.model, self.config, slides, pooled=asked.explain)
        first = found[0]
        said = explain(self.model, self.config.tasks, first.found, first.key) if asked.explain else None
        keys = frozenset({first.key, *(name for one in found for name in (one.own_key, one.content))})
        return first.values, keys, [self._maps(one, said, asked) for one in found]

    def _maps(self, found: SlidePrediction, said: Explanation | None, asked: Asked) -> dict[str, Any]:
        """What is asked for beside the outputs.

        attention: `patches`, columns of x, y (level-0 px), attention and, if explained, effects, in the order of rows.
        top_k: `top`, so many of these patches, the most attended first. Both with `patch`, their edge in level-0 px.
        explain: effects in either, and `curves` (`inference.explain`); null of a model whose pool does not tell.
        """
        if not asked.columns:
            return {}
        maps = {name: found.attention[name].to_numpy() for name in ("x", "y", "attention")}
        if said is not None:
            maps |= {f"effect_{name}": values for name, values in said.of(found.rows).effect.items()}
        best = np.argsort(-maps["attention"], kind="stable")[: asked.top_k]
        top = [{"row": int(row), **{name: values[row].item() for name, values in maps.items()}} for row in best]
        made = {
            "patch": found.extent,
            "patches": {name: values.tolist() for name, values in maps.items()} if asked.attention else None,
            "top": top,
            "curves": None if said is None else said.curves,
        }
        return {name: made[name] for name in asked.columns}


class _Row(NamedTuple):
    """Of a request, as it came."""

    uri: Any
    mpp: Any
    series: Any
    patient: Any
    specimen: Any


class _Answer(NamedTuple):
    """Of a bag."""

    outputs: dict[str, float]
    keys: frozenset[str]
    """By which the bag and its slides are known, were they tested on or learned from."""
    maps: list[dict[str, Any]]
    """Of each slide."""


def _problem(row: _Row) -> str | None:
    """Why a row names no slide; None where it does."""
    if not isinstance(row.uri, str):
        return "uri is missing; give a path or an s3:// URI"
    if not pd.isna(row.series) and not (row.series >= 0 and float(row.series).is_integer()):
        return f"series {row.series:g} is no whole number from 0"
    return None


def _slide(row: _Row, limits: Limits) -> CohortSlide:
    image, microns = None if pd.isna(row.series) else int(row.series), None if pd.isna(row.mpp) else row.mpp
    return CohortSlide(row.uri, limits.admit(row.uri), row.uri, None, microns, {}, {}, series=image)


@dataclass(frozen=True)
class Asked:
    """The `params` of a request."""

    attention: bool
    top_k: int
    explain: bool
    intervals: bool

    @property
    def columns(self) -> list[str]:
        """That the answer has for them, beside the ends of intervals."""
        found = [("patches", self.attention), ("top", self.top_k > 0), ("curves", self.explain)]
        names = [name for name, wanted in found if wanted]
        return ["patch", *names] if names else []


def _refuse_unknown(record: logging.LogRecord) -> bool:
    """Refuse `params` that the signature does not declare, as a misspelt `topk`.

    MLflow drops them before a model sees them, and says so in the server's log alone; a client would get an answer
    without what it asked for. That warning is the only place where their names can still be had.

    Raises:
        MlflowException: the warning is of a request to such a model (HTTP 400).
    """
    found = _DROPPED.match(record.getMessage())
    if found is not None and ast.literal_eval(found[2]) == {field.name for field in fields(Asked)}:
        raise MlflowException.invalid_parameter_value(
            f"params {found[1]} are unknown; there are attention, top_k, explain and intervals"
        )
    return True


def _asked(params: Mapping[str, Any]) -> Asked:
    attention, explained, ends = (bool(params.get(name)) for name in ("attention", "explain", "intervals"))
    asked = Asked(attention, int(params.get("top_k") or 0), explained, ends)
    if asked.top_k < 0:
        raise MlflowException.invalid_parameter_value(f"top_k is {asked.top_k}; give a number from 0")
    return asked


def _late(limits: Limits) -> str:
    return (
        f"not begun: the slides before it took the {limits.seconds:g} s of a request ({SECONDS}); send fewer at a time"
    )


set_model(SlideModel())
