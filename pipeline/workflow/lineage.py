"""What one invocation leaves in MLflow: a parent run, a child for each stage that ran, tags of code and image."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.config.recipe import Config
from pipeline.credentials import masked
from pipeline.logs import about
from pipeline.storage.files import is_remote, join
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.workflow.stage import Record


class Tracking:
    """Opens MLflow and the parent run when the first stage has to run; a run that does nothing leaves no trace."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self.config = config
        self.stack = stack
        self.parent: str | None = None
        self.lineage: Mapping[str, str] = {}
        self._tracker: Tracker | None = None

    def tracker(self) -> Tracker:
        """MLflow, opened at the first call."""
        if self._tracker is None:
            tracking, root = self.config.tracking, self.config.storage.root
            assert tracking.uri is not None  # compose.py fills both
            assert tracking.experiment is not None
            if not is_remote(root):
                Path(root).mkdir(parents=True, exist_ok=True)
            self._tracker = open_tracking(tracking.uri, tracking.experiment, join(root, "artifacts"))
        return self._tracker

    def sum_up(self, records: Iterable[Record]) -> None:
        """Metrics of all stages on the parent run, done now or before: what invocations are compared by."""
        if self.parent is not None:
            metrics = {name: value for record in records for name, value in record.metrics.items()}
            self.tracker().log_metrics(self.parent, metrics, 0)

    @contextmanager
    def child(self, stage: str, stage_fingerprint: str, more: Mapping[str, str], *, alone: bool) -> Iterator[str]:
        """The MLflow run of one stage, below this invocation's parent run, with `more` tags.

        `alone`: no other process works on it, so runs that seem to have none.
        """
        tracker = self.tracker()
        own = {"stage": stage, "fingerprint": stage_fingerprint, "root": self.config.storage.root}  # as the lease
        if alone:
            tracker.end_abandoned(own)
        if self.parent is None:
            self.parent = self.stack.enter_context(tracker.run(self.config.name, tags=self.lineage))
            about(run=self.parent)
            tracker.log_text(self.parent, self.config.model_dump_json(indent=2), "config.json")
            tracker.log_params(self.parent, self.config.model_dump(mode="json"))
        tags = {**self.lineage, **more, **own}
        with tracker.run(stage, self.parent, tags) as run_id, tracker.system_metrics(run_id):
            tracker.log_params(run_id, self.config.model_dump(mode="json"))
            yield run_id


def lineage(config: Config) -> dict[str, str]:
    """Tags that say what code, image and specification made a run."""
    tags = {"config": config.name, "tiling_fingerprint": config.tiling.fingerprint()}
    sources: dict[str, Callable[[], str | None]] = {
        "git_sha": _git_sha,
        "image": lambda: os.environ.get("IPS_IMAGE"),
        "ray_submission_id": lambda: os.environ.get("RAY_SUBMISSION_ID"),
    }
    return tags | {key: masked(value) for key, source in sources.items() if (value := source())}


def _git_sha() -> str | None:
    """Commit of the code, when it runs from a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
