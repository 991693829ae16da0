"""Where time goes, and numbers for Prometheus: counted where the work is done, added up by whoever asks.

`spending` times a kind of work in whatever thread and process it is done; a process hands its sums on (`drain`, `add`),
so that a stage's record has those of all its tasks. `count` and `level` are Ray's metrics, which every node offers to
Prometheus; outside Ray they do nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pipeline.logs import context

Kind = Literal["read", "decode", "transfer", "encode", "write", "wait"]

_SECONDS = "seconds."
_sums: defaultdict[str, float] = defaultdict(float)
_lock = threading.Lock()
_thread = threading.local()


@dataclass(frozen=True)
class Metric:
    """One of the numbers that are offered."""

    form: Literal["Counter", "Gauge"]
    what: str
    tags: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "ips_slides_total": Metric("Counter", "Slides by what became of them", ("stage", "outcome")),
    "ips_patches_total": Metric("Counter", "Patches that a stage is done with", ("stage",)),
    "ips_patches_lost_total": Metric("Counter", "Patches lost to tiles that cannot be decoded", ("stage",)),
    "ips_work_seconds_total": Metric("Counter", "Seconds of all threads by kind of work", ("stage", "kind")),
    "ips_read_bytes_total": Metric("Counter", "Bytes read", ("stage",)),
    "ips_requests_total": Metric("Counter", "Requests to S3 by kind", ("stage", "kind")),
    "ips_stage_seconds": Metric("Gauge", "Seconds that a stage took, once it is done", ("stage",)),
    "ips_step_seconds_total": Metric("Counter", "Seconds of training steps"),
    "ips_wait_seconds_total": Metric("Counter", "Seconds of them in which rank 0 waited for patches"),
    "ips_chunks_ahead": Metric("Gauge", "Chunks whose bytes are read, ahead of the loop"),
    "ips_epoch": Metric("Gauge", "Epochs that are done"),
    "ips_checkpoint_age_seconds": Metric("Gauge", "Seconds since the last checkpoint was begun"),
    "ips_restarts_total": Metric("Counter", "Restarts of training workers"),
}
"""By name; Ray puts `ray_` before it."""


class _Spending:
    """A block of work; a class, for a generator takes twice as long."""

    __slots__ = ("_began", "_kind", "_outer")

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        self._outer: float = getattr(_thread, "inner", 0.0)
        _thread.inner, self._began = 0.0, time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        seconds = time.perf_counter() - self._began
        with _lock:
            _sums[_SECONDS + self._kind] += seconds - _thread.inner
        _thread.inner = self._outer + seconds


def spending(kind: Kind) -> AbstractContextManager[None]:
    """Count the seconds of the block as one kind of work; another kind inside it is not counted twice."""
    return _Spending(kind)


class Laps:
    """Kinds of work that take turns thousands of times a second, as patches are decoded and encoded.

    As `spending` at a third of its cost, which was 1% of a patch: told once, when the block ends. In between others
    may work in the same thread, as between a generator's items.
    """

    __slots__ = ("_at", "_inner", "_sums")

    def __init__(self) -> None:
        self._sums: dict[Kind, float] = {}
        self._at = self._inner = 0.0

    def __enter__(self) -> Laps:
        return self

    def __exit__(self, *_error: object) -> None:
        with _lock:
            for kind, seconds in self._sums.items():
                _sums[_SECONDS + kind] += seconds
        _thread.inner = getattr(_thread, "inner", 0.0) + sum(self._sums.values())
        self._sums = {}

    def start(self) -> None:
        """Begin; what was done since the last lap is not counted."""
        self._inner, self._at = getattr(_thread, "inner", 0.0), time.perf_counter()

    def lap(self, kind: Kind) -> None:
        """What was done since the start, or the last lap, was of this kind; what `spending` counted in it is not."""
        now, inner = time.perf_counter(), getattr(_thread, "inner", 0.0)
        self._sums[kind] = self._sums.get(kind, 0.0) + now - self._at - (inner - self._inner)
        self._inner, self._at = inner, now


def note(name: str, amount: float) -> None:
    """Add to a sum of this process: `seconds.KIND`, `bytes.read`, `requests.KIND`."""
    with _lock:
        _sums[name] += amount


def drain() -> dict[str, float]:
    """The sums since the last time."""
    with _lock:
        found = dict(_sums)
        _sums.clear()
    return found


def add(sums: Mapping[str, float]) -> None:
    """Those of another process that did part of this one's work; offered as metrics, too."""
    with _lock:
        for name, amount in sums.items():
            _sums[name] += amount
    offer(sums, str(context().get("stage", "")))


def seconds(sums: Mapping[str, float]) -> dict[str, float]:
    """Of sums, the seconds by kind."""
    return {name.removeprefix(_SECONDS): round(value, 3) for name, value in sums.items() if name.startswith(_SECONDS)}


def offer(sums: Mapping[str, float], stage: str) -> None:
    """Sums as metrics."""
    for name, value in sums.items():
        what, _, kind = name.partition(".")
        if what == "seconds":
            count("ips_work_seconds_total", value, stage=stage, kind=kind)
        elif what == "requests":
            count("ips_requests_total", value, stage=stage, kind=kind)
        else:
            count("ips_read_bytes_total", value, stage=stage)


def count(name: str, amount: float = 1.0, **tags: str) -> None:
    """Add to one of `METRICS`."""
    if amount > 0 and (metric := _metric(name)) is not None:
        metric.inc(amount, tags)


def level(name: str, value: float, **tags: str) -> None:
    """Set one of `METRICS`."""
    if (metric := _metric(name)) is not None:
        metric.set(value, tags)


def _metric(name: str) -> Any:
    """Ray's object; None where this process has no Ray."""
    ray = sys.modules.get("ray")
    return _made(name) if ray is not None and ray.is_initialized() else None


@cache
def _made(name: str) -> Any:
    from ray.util import metrics

    spec = METRICS[name]
    return getattr(metrics, spec.form)(name, description=spec.what, tag_keys=spec.tags)
