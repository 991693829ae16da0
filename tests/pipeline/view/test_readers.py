from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SlideError
from pipeline.slides.open import open_slide
from pipeline.slides.reader import SlideReader
from pipeline.view.readers import Readers
from tests.synth import tissue_rgb, write_pyramid


class _Counted:
    """Opens one slide and counts how many of it are open."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.most, self.times = path, 0, 0, 0
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[SlideReader]:
        with self._lock:
            self.now += 1
            self.times += 1
            self.most = max(self.most, self.now)
        try:
            with open_slide(self.path) as reader:
                yield reader
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", tissue_rgb(313, 271))


def test_each_thread_has_a_reader_of_its_own_and_few_are_open(path: Path) -> None:
    slides = [_Counted(path) for _ in range(5)]
    readers = Readers(list(slides), per_slide=2, most=3)
    in_use: set[int] = set()
    lock = threading.Lock()

    def read(slide: int) -> None:
        with readers.borrow(slide) as reader:
            with lock:
                assert id(reader) not in in_use
                in_use.add(id(reader))
                assert sum(one.now for one in slides) <= 3
            reader.read(0, 0, 0, 50, 50)
            with lock:
                in_use.remove(id(reader))

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(read, [number % 5 for number in range(400)]))
    assert max(one.most for one in slides) <= 2
    assert readers.open <= 3
    readers.close()
    assert [one.now for one in slides] == [0] * 5


def test_a_reader_is_used_again_and_the_longest_unused_one_closed(path: Path) -> None:
    slides = [_Counted(path) for _ in range(3)]
    readers = Readers(list(slides), per_slide=1, most=2)
    for slide in (0, 1, 0, 2, 0):
        with readers.borrow(slide):
            pass
    assert [one.times for one in slides] == [1, 1, 1]
    assert [one.now for one in slides] == [1, 0, 1]


def test_a_slide_that_cannot_be_opened_takes_no_place(path: Path) -> None:
    good: Callable[[], AbstractContextManager[SlideReader]] = _Counted(path)
    readers = Readers([_Counted(path.with_name("gone.tiff")), good], per_slide=1, most=1)
    for _ in range(3):
        with pytest.raises(SlideError, match="no such file"), readers.borrow(0):
            pass
    with readers.borrow(1) as reader:
        assert reader.dimensions == (313, 271)
    assert readers.open == 1


def test_a_plain_image_is_decoded_once(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    image = _Counted(tmp_path / "a.png")
    readers = Readers([image], per_slide=4)
    with readers.borrow(0):
        pass

    def look(_: int) -> None:
        with readers.borrow(0) as reader:
            reader.read(0, 0, 0, 5, 5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(20)))
    assert image.times == 1


def test_what_is_in_use_at_the_end_is_closed_when_it_is_given_back(path: Path) -> None:
    slide = _Counted(path)
    readers = Readers([slide])
    with readers.borrow(0) as reader:
        readers.close()
        assert reader.read(0, 0, 0, 3, 2).shape == (2, 3, 3)
    assert slide.now == 0
