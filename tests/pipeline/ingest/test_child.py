from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline import telemetry
from pipeline.errors import NodeError, SlideError
from pipeline.ingest import child
from pipeline.ingest.child import DiedError, LimitError, Limits, run

PLENTY = Limits(60, 4)


def sized(mib: int) -> int:
    return len(bytearray(b"x" * (mib << 20)))


def told(text: str) -> str:
    os.write(2, text.encode())
    return text


def refused() -> None:
    raise SlideError("too-small", "a.tiff: as it is")


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    assert [run(partial(os.getenv, name), PLENTY) for name in names] == [str(2**24), str(2**25)]
    monkeypatch.setenv(names[1], "77")
    assert [run(partial(os.getenv, name), PLENTY) for name in names] == [str(2**24), "77"]


def test_one_process_does_what_comes() -> None:
    first, second = run(os.getpid, PLENTY), run(os.getpid, PLENTY)
    assert first == second != os.getpid()
    assert run(partial(os.path.exists, __file__), PLENTY)


def _works(*, fails: bool) -> None:
    with telemetry.spending("decode"):
        time.sleep(0.02)
    if fails:
        raise SlideError("too-small", "x")


def test_where_its_time_went_is_told_even_when_it_fails() -> None:
    telemetry.drain()
    run(partial(_works, fails=False), PLENTY)
    with pytest.raises(SlideError):
        run(partial(_works, fails=True), PLENTY)
    assert 0.04 <= telemetry.drain()["seconds.decode"] < 2


def test_it_loads_no_torch() -> None:
    assert run(partial(eval, "'pipeline.ingest.tiler' in __import__('sys').modules"), PLENTY)
    assert not run(partial(eval, "'torch' in __import__('sys').modules"), PLENTY)


def test_what_the_work_raises_is_raised_here_and_the_process_lives_on() -> None:
    before = run(os.getpid, PLENTY)
    with pytest.raises(SlideError, match=r"a\.tiff: as it is") as caught:
        run(refused, PLENTY)
    assert caught.value.reason == "too-small"
    assert run(os.getpid, PLENTY) == before


@pytest.mark.parametrize(
    ("work", "code"),
    [(os.abort, -signal.SIGABRT), (partial(os._exit, 7), 7), (partial(eval, "__import__('ctypes').string_at(0)"), -11)],
)
def test_its_end_is_told_and_the_next_work_is_done(work: partial[None], code: int) -> None:
    with pytest.raises(DiedError, match="its process ended") as caught:
        run(work, PLENTY)
    assert caught.value.code == code
    assert not caught.value.killed
    assert run(partial(pow, 2, 10), PLENTY) == 1024


def test_its_last_words_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(partial(told, "beside\n"), PLENTY) == "beside\n"
    assert capsys.readouterr().err == "beside\n"
    with pytest.raises(DiedError, match=r"exit status 3\): in short$"):
        run(partial(eval, "(__import__('os').write(2, b'at length\\nin short\\n'), __import__('os')._exit(3))"), PLENTY)


def test_too_much_time_or_memory_ends_it() -> None:
    with pytest.raises(LimitError, match=r"s of CPU time are not enough"):
        run(partial(exec, "while True: pass"), Limits(0.3, 4))
    with pytest.raises(LimitError, match=r"0\.[34]\d GiB of memory are not enough"):
        run(partial(exec, "x = []\nwhile True: x.append(b'x' * 2**22)"), Limits(60, 0.4))
    assert run(partial(sized, 100), Limits(60, 0.4)) == 100 << 20


def test_waiting_is_no_cpu_time_and_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run(partial(time.sleep, 0.5), Limits(0.3, 4))
    monkeypatch.setattr(child, "STALLED_S", 0.3)
    with pytest.raises(LimitError, match="something that does not come"):
        run(partial(time.sleep, 60), PLENTY)


def test_a_changed_environment_is_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(partial(os.getenv, "AWS_PROFILE"), PLENTY) is None
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert run(partial(os.getenv, "AWS_PROFILE"), PLENTY) == "other"


def slow_pid() -> int:
    time.sleep(0.5)
    return os.getpid()


def test_threads_do_not_wait_for_each_other() -> None:
    with ThreadPoolExecutor(2) as pool:
        one, two = (pool.submit(run, slow_pid, PLENTY) for _ in range(2))
        assert one.result() != two.result()


def test_where_it_cannot_start_the_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_MODULES", ("no.such.module",))
    monkeypatch.setenv("AWS_PROFILE", "not an idle one")
    with pytest.raises(NodeError, match=r"does not start.*No module named 'no'"):
        run(os.getpid, PLENTY)


PARENT = """
from functools import partial
from pipeline.ingest import child
work = "import os, time; print(os.getpid(), file=open(%r, 'w'), flush=True); time.sleep(60)"
child.run(partial(exec, work), child.Limits(9, 4))
"""


def test_it_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT % str(told)])
    while not (told.exists() and told.read_text().endswith("\n")):
        time.sleep(0.05)
    orphan = psutil.Process(int(told.read_text()))
    parent.kill()
    parent.wait()
    orphan.wait(20)
