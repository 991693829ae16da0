"""MLflow runs, by explicit run id: the stages in the driver and rank 0 of training share one run safely.

Nothing here uses MLflow's active run, so a worker can log into a run without ending it. The store is made, and
migrated, by `open_tracking` in the driver before any worker starts, and by one driver at a time: first use of an
SQLite file by several processes at once fails ("duplicate column name").
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image

from pipeline.credentials import masked, masked_value, refusal
from pipeline.errors import Interrupted, PipelineError, TrackingError
from pipeline.tracking.places import missing

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Row = tuple[int, int, dict[str, float]]
"""A step, the time in ms since 1970, and metrics. MLflow stores an equal row that is sent twice once."""

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's page takes it for an evaluation of LLMs
_UNSAID = "a signal ended it (Ctrl-C, SIGTERM, `ray job stop`); the same command goes on"  # KeyboardInterrupt is empty
_PARAM_CHARS = 6000  # MLflow's limits: characters of a value, and entries of one request
_TAG_CHARS = 8000
_PARAM_BATCH = 100
_METRIC_BATCH = 1000
_NOT_IN_NAMES = re.compile(r"[^\w.\- :/]")  # of metrics
# Three attempts of 4 s and one pause of 4 s: a server that is down is reported within 20 s. MLflow's own
# patience (7 retries of up to 120 s) is kept for a run that is under way, so it survives a server's restart.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}


@dataclass(frozen=True)
class Store:
    """An MLflow server or database, with whatever experiments it has. Pickles as text; a process makes its own client.

    The URI holds no password: the client finds one in the environment of its own process.
    """

    uri: str

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.uri,)

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client of this store."""
        return MlflowClient(self.uri, self.uri)


@dataclass(frozen=True)
class Tracker(Store):
    """The runs of one experiment of a store."""

    experiment_id: str

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.uri, self.experiment_id)

    def start_run(self, name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Id of a new run in state RUNNING, a child of `parent_run_id` where that is given."""
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        with reported(self.uri):
            run = self.client.create_run(
                self.experiment_id, tags=_tags(resolve_tags({**(tags or {}), **parent})), run_name=name
            )
        return str(run.info.run_id)

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """Set the run's end time and status. MLflow prints the URL of the run; stdout is kept for results."""
        with reported(self.uri), redirect_stdout(sys.stderr):
            self.client.set_terminated(run_id, status)

    @contextmanager
    def run(self, name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None) -> Iterator[str]:
        """A run for the length of a block: FINISHED, or FAILED / KILLED with the message in the tag `error`.

        KILLED is for Interrupted and KeyboardInterrupt. The block's own exception always goes on.
        """
        run_id = self.start_run(name, parent_run_id, tags)
        try:
            yield run_id
        except BaseException as error:
            status: RunStatus = "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"
            try:
                self.set_tags(run_id, {"error": f"{type(error).__name__}: {str(error) or _UNSAID}"})
                self.end_run(run_id, status)
            except TrackingError as unreachable:
                error.add_note(f"The run {run_id} could not be marked {status}: {unreachable}")
            raise
        self.end_run(run_id, "FINISHED")

    def end_abandoned(self, tags: Mapping[str, str]) -> None:
        """Mark runs with these tags that still seem to run, and their parents, as KILLED: their process died mute.

        For whoever holds the lease on what the tags name, so that a run that is found here has no process.
        """
        chosen = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        with reported(self.uri):
            running = f"attributes.status = 'RUNNING' and {chosen}"
            runs = self.client.search_runs([self.experiment_id], running)
            for run in runs:
                for run_id in (run.info.run_id, run.data.tags.get("mlflow.parentRunId")):
                    if run_id is not None:
                        self.set_tags(run_id, {"error": "its process was killed; a later run went on"})
                        self.end_run(run_id, "KILLED")

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Nested data as flat parameters `a.b.0.c`; values are cut at MLflow's 6,000 characters."""
        entries = [Param(key, value[:_PARAM_CHARS]) for key, value in flatten(params)]
        for start in range(0, len(entries), _PARAM_BATCH):
            with reported(self.uri):
                self.client.log_batch(run_id, params=entries[start : start + _PARAM_BATCH])

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], step: int = 0, model_id: str | None = None
    ) -> None:
        """Metrics at one step. MLflow appends: a step logged twice is stored twice (see `latest_step`).

        Characters that MLflow takes in no name, as those of a class `3+4`, become `_`.
        """
        now = time.time_ns() // 1_000_000
        entries = [
            Metric(_NOT_IN_NAMES.sub("_", key), float(value), now, step, model_id=model_id, run_id=run_id)
            for key, value in metrics.items()
        ]
        for start in range(0, len(entries), _METRIC_BATCH):
            with reported(self.uri):
                self.client.log_batch(run_id, metrics=entries[start : start + _METRIC_BATCH])

    def log_rows(self, run_id: str, rows: Sequence[Row]) -> None:
        """Metrics of many steps, in as few requests as MLflow takes."""
        entries = [Metric(key, float(value), at, step) for step, at, values in rows for key, value in values.items()]
        for start in range(0, len(entries), _METRIC_BATCH):
            with reported(self.uri):
                self.client.log_batch(run_id, metrics=entries[start : start + _METRIC_BATCH])

    def log_image(self, run_id: str, image: Image.Image, key: str, step: int) -> None:
        """A picture of a series: MLflow's page shows it with a slider over the steps."""
        with reported(self.uri):
            self.client.log_image(run_id, image, key=key, step=step, synchronous=True)

    def latest_step(self, run_id: str, key: str) -> int:
        """Greatest step at which the metric `key` was logged, -1 when never: log only beyond it after a restart."""
        with reported(self.uri):
            return max((metric.step for metric in self.client.get_metric_history(run_id, key)), default=-1)

    def latest_metrics(self, run_id: str) -> dict[str, float]:
        """The last value of every metric of a run."""
        return self.latest(run_id)[0]

    def latest(self, run_id: str) -> tuple[dict[str, float], dict[str, str]]:
        """The last value of every metric of a run, and its tags."""
        with reported(self.uri):
            data = self.client.get_run(run_id).data
        return dict(data.metrics), dict(data.tags)

    def log_event(self, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float], step: int) -> None:
        """Tags, and metrics at one step, without patience: TrackingError soon where a server is down."""
        with _impatient():
            self.set_tags(run_id, tags)
            self.log_metrics(run_id, metrics, step)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tags of a run; values are cut at MLflow's 8,000 characters."""
        with reported(self.uri):
            for key, value in _tags(tags).items():
                self.client.set_tag(run_id, key, value)

    def log_dataset(self, run_id: str, name: str, digest: str, uri: str, context: str) -> None:
        """The cohort as an input of the run. `context` is what it served: `training`, `evaluation`."""
        source = json.dumps({"uri": uri})
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        with reported(self.uri):
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Text as an artifact called `name` (config.yaml, report.html)."""
        with reported(self.uri):
            self.client.log_text(run_id, text, name)

    @contextmanager
    def system_metrics(self, run_id: str, interval_s: float = 5.0) -> Iterator[None]:
        """Log this machine's CPU, memory, disk, network and GPU use as `system/...` while the block runs."""
        monitor = SystemMetricsMonitor(run_id, sampling_interval=interval_s, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


def open_tracking(uri: str, experiment: str, artifact_root: str) -> Tracker:
    """Open (for SQLite: make) the store and the experiment.

    Args:
        uri: `sqlite:///FILE`, `http(s)://...` or whatever else MLflow accepts as a tracking URI.
        experiment: made when absent.
        artifact_root: folder or s3:// URI of a new experiment's artifacts (MLflow's own choice would be `mlruns` in
            the working directory). An experiment that exists keeps the place it has.

    Raises:
        TrackingError: the store cannot be reached or refuses; within 20 s when a server is down.
    """
    uri = _checked(uri)
    with _impatient(), reported(uri), _one_by_one(uri):
        _make_sqlite(uri, artifact_root)
        client = MlflowClient(uri, uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                made = client.create_experiment(experiment, artifact_location=_location(artifact_root), tags=_KIND)
                return Tracker(uri, made)
            except MlflowException as error:
                found = client.get_experiment_by_name(experiment)  # another driver made it at the same moment
                if found is None:
                    raise error from None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {experiment!r} at {uri} is deleted; restore it with "
            f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {found.experiment_id}` "
            "or set tracking.experiment to another name"
        )
    kept = found.artifact_location
    if kept != _location(artifact_root) and (gone := missing(uri, kept)) is not None:
        raise TrackingError(f"experiment {experiment!r}: {gone}, or set tracking.experiment to another name")
    return Tracker(uri, found.experiment_id)


def _make_sqlite(uri: str, artifact_root: str) -> None:
    """MLflow's own experiment, Default, would else lie in the working directory, which a Ray job throws away."""
    if uri.startswith("sqlite") and not Path(uri.partition(":///")[2]).exists():
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # loads for a second

        SqlAlchemyStore(uri, _location(artifact_root))


@contextmanager
def _one_by_one(uri: str) -> Iterator[None]:
    """One process at a time makes an SQLite file; a server sees to that itself."""
    if not uri.startswith("sqlite"):
        yield
        return
    file = Path(uri.partition(":///")[2])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def connect(uri: str) -> Store:
    """Open a store that exists, to read from it; nothing is made. Models outlive the experiments they come from.

    Raises:
        TrackingError: the store is not there or cannot be reached; within 20 s when a server is down.
    """
    uri = _checked(uri)
    file = Path(uri.partition(":///")[2])
    if uri.startswith("sqlite") and not file.is_file():
        raise TrackingError(f"MLflow at {uri}: {file} does not exist; name the store of the run that trained the model")
    store = Store(uri)
    with _impatient(), reported(uri):
        store.client.search_experiments(max_results=1)
    return store


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Turn whatever MLflow and its vendors raise (HTTP, SQL, S3, files) into a TrackingError with the remedy."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        raise TrackingError(f"MLflow at {uri}: {type(error).__name__}: {error}\n{_remedy(uri)}") from error


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings and sequences as (dotted path, text); a sequence of scalars is one JSON leaf."""
    if isinstance(value, Mapping):
        children: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        children = enumerate(value)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)
        return
    for key, child in children:
        yield from flatten(child, f"{prefix}.{key}" if prefix else str(key))


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    """As MLflow takes them; masked, for the URL of git's remote is one of MLflow's own, and may hold a token."""
    return {key: masked(str(value))[:_TAG_CHARS] for key, value in tags.items()}


def _location(root: str) -> str:
    return root if "://" in root else Path(root).absolute().as_uri()


def _checked(uri: str) -> str:
    """The URI, without a credential; a relative SQLite file made absolute, for workers run in other directories."""
    if (problem := refusal(uri)) is not None:
        raise TrackingError(f"MLflow's URI {masked_value(uri)} {problem}")
    scheme, _, name = uri.partition(":///")
    return f"{scheme}:///{Path(name).absolute()}" if scheme.startswith("sqlite") else uri


@contextmanager
def _impatient() -> Iterator[None]:
    """Short HTTP patience while the store is opened, unless the environment sets its own."""
    ours = {key: value for key, value in _IMPATIENT.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            del os.environ[key]


def _remedy(uri: str) -> str:
    if uri.startswith("http"):
        return (
            "Check that the server runs and that this machine may reach it (`mlflow server --host HOST "
            "--allowed-hosts NAMES`), or correct tracking.uri; tracking.uri=null uses a local SQLite file. Where the "
            "server asks for a password, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN."
        )
    return (
        "Check that the file and its folder can be written and the artifact place can be reached; for a store "
        f"made by another MLflow: `mlflow db upgrade {uri}`."
    )
