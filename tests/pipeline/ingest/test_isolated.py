"""A slide that breaks its reader, or costs too much, is quarantined; a later run that allows more tries again."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.ingest import child, isolated, tiler
from pipeline.ingest.child import DiedError, LimitError
from pipeline.ingest.isolated import store_slide
from pipeline.ingest.statuses import look_up
from pipeline.ingest.versions import look_at
from pipeline.store.patches import PatchStore, SlideStatus
from tests.pipeline.tiled import RGB, SPEC, contents, row
from tests.security.hostile import tiff, zeros
from tests.synth import write_pyramid


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "good.tiff", RGB, levels=2)


@pytest.fixture
def costly(tmp_path: Path) -> Path:
    """Which takes minutes to read, of a file of 100 kB."""
    data = zeros(3 * 2**24)
    return Path(tiff(tmp_path, size=(409_600, 204_800), tile=(4096, 4096), data=data, tiles=5000, compression=8))


def test_the_store_is_that_of_this_process(good: Path, tmp_path: Path) -> None:
    apart, here = (work(row(good), SPEC, str(tmp_path / name)) for name, work in
                   (("apart", store_slide), ("here", tiler.store_slide)))  # fmt: skip
    assert apart == here
    assert contents(tmp_path / "apart") == contents(tmp_path / "here")


def test_a_slide_that_is_too_expensive_is_tried_again_where_it_may_cost_more(costly: Path, tmp_path: Path) -> None:
    store, spec = str(tmp_path / "store"), SPEC.model_copy(update={"max_seconds": 0.2})
    first = store_slide(row(costly), spec, store)
    assert first.status == "quarantined"
    assert str(first.reason).startswith("too-expensive: ")
    assert "raise tiling.max_seconds=0.2 or tiling.max_slide_gib=2" in str(first.reason)
    assert first.limits == (0.2, 2.0)
    patches = PatchStore(store, spec.fingerprint())
    slides = [row(costly)]
    versions = look_at(slides, spec)

    def found(given: TilingConfig) -> tuple[list[tuple[int, SlideStatus]], list[int]]:
        fresh: list[int] = []
        return list(look_up(slides, versions, given, patches, fresh)), fresh

    assert found(spec) == ([(0, first)], [])  # free where nothing changed
    less = spec.model_copy(update={"max_seconds": 0.1})
    assert found(less) == ([(0, first)], [])
    more = spec.model_copy(update={"max_seconds": 0.3})
    assert found(more) == ([], [0])
    again = store_slide(row(costly), more, store)
    assert again.limits == (0.3, 2.0)
    assert more.fingerprint() == spec.fingerprint()


def test_each_share_of_a_large_slide_has_its_own_time(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def here(work: partial[Any], limits: child.Limits) -> Any:
        asked.append((work.func, limits))
        return work()

    monkeypatch.setattr(child, "run", here)
    monkeypatch.setattr("pipeline.store.parts.MAX_PART_PATCHES", 9)
    monkeypatch.setattr("pipeline.ingest.balance.TASK_PX", 2 * 9 * 64**2)
    assert store_slide(row(good), SPEC, str(tmp_path / "store")).status == "committed"
    assert [work for work, _ in asked] == [tiler.begin_slide, *[tiler.store_share] * (len(asked) - 1)]
    assert len(asked) > 2
    assert {limits for _, limits in asked} == {child.Limits(SPEC.max_seconds, SPEC.max_slide_gib)}


@pytest.mark.parametrize(("code", "tries"), [(-signal.SIGKILL, 3), (-signal.SIGABRT, 1)])
def test_only_a_killed_process_is_begun_again(
    code: int, tries: int, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def dies(work: object, limits: child.Limits) -> SlideStatus:
        begun.append(work)
        raise DiedError(code, "failed to allocate 160000000000 bytes")

    monkeypatch.setattr(child, "run", dies)
    status = store_slide(row(good), SPEC, str(tmp_path / "store"))
    assert len(begun) == tries
    assert str(status.reason).startswith("crash: ")
    assert "failed to allocate" in str(status.reason)
    assert not (tmp_path / "store").exists()  # not recorded: the next run tries again


@pytest.mark.parametrize("error", [MemoryError(), LimitError("2.01 GiB of memory are not enough")])
def test_memory_that_is_short_here_is_named_too(
    error: Exception, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(work: object, limits: child.Limits) -> SlideStatus:
        raise error

    monkeypatch.setattr(child, "run", fails)
    with pytest.raises(SlideError, match="memory") as caught:
        isolated.apart(row(good), SPEC, lambda: None)
    assert caught.value.reason == tiler.TOO_EXPENSIVE
