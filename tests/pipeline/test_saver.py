from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import Progress, Snapshot, take_snapshot, write_snapshot
from pipeline.config import Config
from pipeline.errors import StageError, StorageError
from pipeline.saver import COMMIT, Saver, newest, restore
from tests.s3 import S3Server, serve_s3

CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "t", "column": "label"}]})


def _trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def _snapshot(step: int, best: str | None = None) -> Snapshot:
    progress = Progress(1, step, "plan", {"epoch": 1.0}, 2, {"steps": 2.0}, best, unsent=[(3, 4, {"loss": 0.5})])
    return take_snapshot(*_trained(step), CONFIG, progress)


def _save(folder: Path | str, *steps: int, best: str | None = None) -> None:
    with Saver(str(folder)) as saver:
        for step in steps:
            saver.save(_snapshot(step, best))


def test_the_newest_comes_back_with_all_that_it_held(tmp_path: Path) -> None:
    assert newest(str(tmp_path)) is None
    _save(tmp_path, 9, 10)
    found = newest(str(tmp_path))
    assert found is not None
    assert found.name == "step-00000010"
    model, optimizer = _trained(99)
    assert restore(str(tmp_path), found.name, model, optimizer, "plan").step == 10
    expected, other = _trained(10)
    assert torch.equal(model.get_parameter("weight"), expected.get_parameter("weight"))
    assert str(optimizer.state_dict()) == str(other.state_dict())
    with pytest.raises(StageError, match=r"follows another plan \(digest plan, now other\)"):
        restore(str(tmp_path), found.name, model, optimizer, "other")


def test_a_snapshot_is_what_was_not_what_became(tmp_path: Path) -> None:
    model, optimizer = _trained()
    before = model.get_parameter("weight").detach().clone()
    snapshot = take_snapshot(model, optimizer, CONFIG, Progress(0, 1, "plan"))
    optimizer.step()
    assert not torch.equal(model.get_parameter("weight"), before)
    assert torch.equal(snapshot.weights["weight"], before)
    assert snapshot.optimizer["state"][0]["step"] == 1


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3)
    _save(tmp_path, 4, 5, 6, best="step-00000003")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000005", "step-00000006"]


def test_an_unfinished_checkpoint_is_passed_over_and_removed(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    for step in (3, 2):  # a killed writer leaves files without the commit
        (tmp_path / f"step-0000000{step}" / "weights.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / f"step-0000000{step}" / COMMIT).unlink(missing_ok=True)
    (tmp_path / "step-00000003" / "weights.safetensors").write_bytes(b"half")
    found = newest(str(tmp_path))
    assert found is not None
    assert found.step == 1
    _save(tmp_path, 4, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_files_removed_or_cut_by_hand_mean_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"short")
    found = newest(str(tmp_path))
    assert found is not None
    assert found.step == 1
    assert "state.pt is gone or truncated; the checkpoint before it is used" in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    assert newest(str(tmp_path)) is None


@pytest.mark.parametrize("cut", [False, True])
def test_a_best_checkpoint_that_is_gone_is_an_error(tmp_path: Path, *, cut: bool) -> None:
    """Else a finished run would be done again and again, with a result that is not there."""
    _save(tmp_path, 3)
    _save(tmp_path, 4, 5, best="step-00000003")
    found = newest(str(tmp_path))
    assert found is not None
    assert found.best == "step-00000003"
    if cut:
        (tmp_path / "step-00000003" / "weights.safetensors").write_bytes(b"short")
    else:
        shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(StageError, match=r"step-00000003: the best checkpoint so far is gone .*to train anew"):
        newest(str(tmp_path))


def test_changed_bytes_are_damage(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    weights = tmp_path / "step-00000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StageError, match=r"weights.safetensors: damaged; remove .*step-00000001"):
        restore(str(tmp_path), "step-00000001", *_trained(), "plan")


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    commit = tmp_path / "step-00000001" / COMMIT
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "version": 0}))
    with pytest.raises(StageError, match=r"checkpoint of version 0, this is version 1; .* to train anew"):
        newest(str(tmp_path))


def test_a_failed_write_is_raised_by_the_next_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a folder of this path is a file"):
        _save(tmp_path / "file", 1)
    saver = Saver(str(tmp_path / "file"))
    saver.save(_snapshot(1))
    with pytest.raises(StorageError):
        saver.save(_snapshot(2))
    saver.__exit__(KeyError, KeyError(), None)  # the block's own error goes on


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = write_snapshot

    def waits(folder: Path, snapshot: Snapshot) -> None:
        gate.wait(30)
        write(folder, snapshot)

    monkeypatch.setattr("pipeline.saver.write_snapshot", waits)
    with Saver(str(tmp_path)) as saver:
        saver.save(_snapshot(1))
        states = [saver.is_busy, newest(str(tmp_path)) is None]
        gate.set()
    assert states == [True, True]
    assert newest(str(tmp_path)) is not None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def test_in_a_bucket(server: S3Server) -> None:
    folder = server.bucket("bucket") + "/train/run"
    _save(folder, 1, 2, 3)
    found = newest(folder)
    assert found is not None
    assert replace(found, unsent=[]) == replace(_snapshot(3).progress, unsent=[])
    assert restore(folder, found.name, *_trained(), "plan").step == 3
    assert sorted(p.name for p in (server.folder / "bucket/train/run").iterdir()) == ["step-00000002", "step-00000003"]
