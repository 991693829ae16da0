"""What a training tells MLflow, without waiting for it: rows of metrics, and pictures of what was selected.

A thread sends them every few seconds. A row that is under way when the process is killed is not lost: checkpoints
carry the rows that were not sent yet, and a run that goes on sends those that MLflow does not have. So every step is
there once, whatever happened in between.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image

from pipeline.bags.sources import BagSource
from pipeline.errors import PipelineError, TrackingError
from pipeline.tracking.tracker import Row, Tracker

log = logging.getLogger(__name__)

_PERIOD_S = 5.0
_STEP_KEY, _EPOCH_KEY = "loss", "epoch"  # a row of a step holds the one, a row of an epoch the other
_TILE_PX = 64
_COLUMNS = 8
Shown = tuple[BagSource, torch.Tensor]
"""A slide's source, and the rows of its patches to show, best first."""


class Journal:
    """The rows of one MLflow run. A server that is away is tried again until the block ends.

    Args:
        tracker: of the run.
        run_id: which one.
        unsent: rows that an earlier process had not sent when it wrote the checkpoint.
    """

    def __init__(self, tracker: Tracker, run_id: str, unsent: Iterable[Row] = ()) -> None:
        self._tracker, self._run_id = tracker, run_id
        self._known = {key: tracker.latest_step(run_id, key) for key in (_STEP_KEY, _EPOCH_KEY)}
        self._rows: list[Row] = []
        self._sheets: list[tuple[int, Sequence[Shown]]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_often, name="journal", daemon=True)
        for step, at, metrics in unsent:
            self._add(step, at, metrics)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at a step, unless an earlier process has; a row is a step's or an epoch's."""
        self._add(step, time.time_ns() // 1_000_000, metrics)

    def show(self, epoch: int, shown: Sequence[Shown]) -> None:
        """Log a contact sheet: a row of patches for each slide."""
        with self._lock:
            self._sheets.append((epoch, shown))

    @property
    def unsent(self) -> list[Row]:
        """The rows that MLflow has not confirmed."""
        with self._lock:
            return list(self._rows)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Send the rest; TrackingError when that fails, unless the block itself raised."""
        self._stop.set()
        self._thread.join()
        try:
            self._send()
        except TrackingError as unreachable:
            if error is None:
                raise
            error.add_note(f"{len(self.unsent)} rows of metrics were not sent: {unreachable}")

    def _add(self, step: int, at: int, metrics: Mapping[str, float]) -> None:
        key = _EPOCH_KEY if _EPOCH_KEY in metrics else _STEP_KEY
        if step > self._known[key]:
            with self._lock:
                self._rows.append((step, at, dict(metrics)))

    def _send_often(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self._send()
            except TrackingError as unreachable:
                log.warning("train: metrics wait for MLflow (%s)", str(unreachable).splitlines()[0])

    def _send(self) -> None:
        with self._lock:
            rows = list(self._rows)
        self._tracker.log_rows(self._run_id, rows)
        with self._lock:
            self._rows = self._rows[len(rows) :]
            sheets, self._sheets = self._sheets, []
        for epoch, shown in sheets:
            self._send_sheet(epoch, shown)

    def _send_sheet(self, epoch: int, shown: Sequence[Shown]) -> None:
        """A picture is for people: one that cannot be made costs a warning, not the training."""
        try:
            self._tracker.log_image(self._run_id, contact_sheet(shown), "selected_patches", epoch)
        except PipelineError as error:
            log.warning("train: no picture of epoch %d's patches (%s)", epoch, str(error).splitlines()[0])


def epoch_metrics(epoch: int, tally: Mapping[str, float]) -> dict[str, float]:
    """Of an epoch, from the sums over its steps: what they took, and how much of the slides they had to read."""
    changed = {"train_winners_changed": tally["changed"] / tally["rescored"]} if "rescored" in tally else {}
    return {
        "epoch": float(epoch),
        "train_loss": tally["loss"] / tally["steps"],
        "patches_per_s": tally["read"] / tally["seconds"],
        "device_wait": tally["waited"] / tally["seconds"],
        "wait_s": tally["waited"],
        "encode_s": tally["seconds"] - tally["waited"],
        "epoch_s": tally["seconds"],
        "share_read": tally["read"] / tally["patches"],
        **changed,
    }


def send_unsent(tracker: Tracker, run_id: str, unsent: Iterable[Row]) -> None:
    """Send what the last checkpoint of a finished training had not sent; TrackingError when that fails."""
    with Journal(tracker, run_id, unsent):
        pass


def contact_sheet(shown: Sequence[Shown]) -> Image.Image:
    """One row a slide, its patches at 64 px from left to right; white where a slide has fewer."""
    sheet = np.full((len(shown) * _TILE_PX, _COLUMNS * _TILE_PX, 3), 255, np.uint8)
    for line, (source, rows) in enumerate(shown):
        for column, payload in enumerate(source.payloads(rows[:_COLUMNS].numpy())):
            patch = Image.open(io.BytesIO(payload)).convert("RGB").resize((_TILE_PX, _TILE_PX))
            top, left = line * _TILE_PX, column * _TILE_PX
            sheet[top : top + _TILE_PX, left : left + _TILE_PX] = np.asarray(patch)
    return Image.fromarray(sheet)
