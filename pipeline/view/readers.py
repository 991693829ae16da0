"""Open slides for many threads: few readers, each used by one thread at a time, the longest unused closed first."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from pipeline.slides.reader import SlideReader

PER_SLIDE = min(4, os.cpu_count() or 1)  # decoding is all that they do; a slide in a bucket is waited for, too
MOST = 8  # open at once: OpenSlide keeps 32 MB each, and a reader its table of tiles

Opener = Callable[[], AbstractContextManager[SlideReader]]


@dataclass
class _Opened:
    slide: int
    reader: SlideReader
    held: ExitStack = field(repr=False)


class Readers:
    """A pool.

    Args:
        openers: by number of the slide: opens it, for a block.
        per_slide: readers of one slide at most; of a plain image, which is decoded whole, one.
        most: of all slides.
    """

    def __init__(self, openers: list[Opener], per_slide: int = PER_SLIDE, most: int = MOST) -> None:
        self._openers, self._per_slide, self._most = openers, per_slide, most
        self._changed = threading.Condition()
        self._idle: list[_Opened] = []  # the longest unused first
        self._count: Counter[int] = Counter()  # of readers that are open, or being opened, by slide
        self._alone: set[int] = set()
        self._closed = False

    @contextmanager
    def borrow(self, slide: int) -> Iterator[SlideReader]:
        """A reader of a slide for this thread alone; waits for one to be free.

        Raises:
            SlideError: the slide cannot be opened; the next call tries again.
        """
        opened = self._take(slide)
        if opened is None:
            opened = self._open(slide)
        try:
            yield opened.reader
        finally:
            with self._changed:
                self._idle.append(opened)
                if self._closed:
                    self._drop(opened)
                self._changed.notify_all()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it is given back."""
        with self._changed:
            self._closed = True
            for opened in list(self._idle):
                self._drop(opened)

    @property
    def open(self) -> int:
        """Readers that are open."""
        return self._count.total()

    def _take(self, slide: int) -> _Opened | None:
        """An idle reader; None: there is room for one more, which is counted already."""
        with self._changed:
            while True:
                for opened in reversed(self._idle):
                    if opened.slide == slide:
                        self._idle.remove(opened)
                        return opened
                if self._count[slide] < (1 if slide in self._alone else self._per_slide):
                    if self._count.total() >= self._most and self._idle:
                        self._drop(self._idle[0])
                    if self._count.total() < self._most:
                        self._count[slide] += 1
                        return None
                self._changed.wait()

    def _open(self, slide: int) -> _Opened:
        held = ExitStack()
        try:
            reader = held.enter_context(self._openers[slide]())
        except BaseException:
            with self._changed:
                self._count[slide] -= 1
                self._changed.notify_all()
            raise
        if len(reader.levels) == 1 and reader.native_tiles(0) is None:
            self._alone.add(slide)
        return _Opened(slide, reader, held)

    def _drop(self, opened: _Opened) -> None:
        self._idle.remove(opened)
        self._count[opened.slide] -= 1
        opened.held.close()
