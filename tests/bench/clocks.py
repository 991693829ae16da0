"""Where the seconds of a selection go: decoding, the way to the device, the encoder. A real run has no such clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ips.selection.scorer
from ips.selection.scorer import Scorer
from ips.selection.transfer import _side_stream, to_device
from pipeline.bags import patch_bag

Span = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass
class Clocks:
    """Seconds of each kind of work. On a GPU the events are of the stream that does it, so nothing waits for them."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("decode", "transfer", "encode"), 0.0))
    """`decode` is summed over the threads."""
    _spans: list[tuple[str, Span]] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def reset(self) -> None:
        """Begin anew."""
        self.read()
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def read(self) -> dict[str, float]:
        """The seconds so far; waits for the device."""
        if self._spans:
            torch.cuda.synchronize()
        for kind, (start, end) in self._spans:
            self.seconds[kind] += start.elapsed_time(end) / 1000
        self._spans = []
        return self.seconds

    def timed(self, kind: str, work: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> Any:
        """What the work returns; its time on the stream, or on the host's clock where there is none."""
        if stream is None:
            began = time.perf_counter()
            result = work()
            with self._lock:
                self.seconds[kind] += time.perf_counter() - began
            return result
        span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        span[0].record(stream)
        result = work()
        span[1].record(stream)
        self._spans.append((kind, span))
        return result


@contextmanager
def clocked() -> Iterator[Clocks]:
    """Clocks that run while the block does."""
    clocks = Clocks()
    decode, encode = patch_bag._decode_all, Scorer.content

    def decoded(jobs: Sequence[patch_bag._Job]) -> None:
        clocks.timed("decode", lambda: decode(jobs))

    def moved(patches: Tensor, device: torch.device, *, side_stream: bool = True) -> Any:
        stream = _side_stream(device) if device.type == "cuda" else None
        return clocks.timed("transfer", lambda: to_device(patches, device, side_stream=side_stream), stream)

    def encoded(scorer: Scorer, patches: Tensor) -> Any:
        stream = torch.cuda.current_stream(patches.device) if patches.is_cuda else None
        return clocks.timed("encode", lambda: encode(scorer, patches), stream)

    with (
        mock.patch.object(patch_bag, "_decode_all", decoded),
        mock.patch.object(ips.selection.scorer, "to_device", moved),
        mock.patch.object(Scorer, "content", encoded),
    ):
        yield clocks
