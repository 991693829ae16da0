"""What a storage that writes on a condition promises: of files, and of threads that claim one lease at a time."""

from __future__ import annotations

import threading

import pytest

from pipeline.errors import StageError
from pipeline.storage import files, lease
from pipeline.storage.cloud import ChangedError


def six_that_claim(uri: str) -> list[str]:
    """How it ends for each, sorted: all have judged that nobody holds the lease before one of them claims it."""
    together, ends, done, begin = threading.Barrier(6), list[str](), threading.Event(), lease._begin

    def meet(uri: str, tag: str | None) -> lease.Claim:
        together.wait(10)
        return begin(uri, tag)

    def claim() -> None:
        try:
            with lease.held(uri, "work") as mine:
                done.wait(2)  # some beats
                mine.check()
                ends.append("held")
        except StageError as error:
            ends.append("same moment" if "at the same moment" in str(error) else str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "BEAT_S", 0.05)
        patch.setattr(lease, "_begin", meet)
        threads = [threading.Thread(target=claim) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sorted(ends)


def check_replaced_only_as_it_was_read(uri: str) -> str:
    """That a file is written only while it is what was read; the tag of its last state."""
    assert files.read_tagged(uri) is None
    tag = files.replace(uri, b"1", None)
    with pytest.raises(ChangedError):
        files.replace(uri, b"2", None)
    assert files.read_tagged(uri) == (b"1", tag)
    later = files.replace(uri, b"3", tag)
    with pytest.raises(ChangedError):
        files.replace(uri, b"4", tag)
    assert files.read_tagged(uri) == (b"3", later)
    assert later is not None
    return later
