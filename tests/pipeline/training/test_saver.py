from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config.recipe import Config
from pipeline.errors import StageError, StorageError
from pipeline.model.checkpoint import Progress, Snapshot, take_snapshot, write_snapshot
from pipeline.storage.lease import Lease, held
from pipeline.training.saver import COMMIT, Saver, model_folder, newest, progress_of, restore
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


def test_a_forged_state_is_named_where_it_lies_and_is_no_better_the_next_time(tmp_path: Path) -> None:
    _save(tmp_path, 9)
    state, commit = tmp_path / "step-00000009" / "state.pt", tmp_path / "step-00000009" / COMMIT
    torch.save(nn.Linear(2, 2), state)
    facts = json.loads(commit.read_text())
    facts["files"]["state.pt"] = {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    commit.write_text(json.dumps(facts))
    assert newest(str(tmp_path), read=True) is not None
    with pytest.raises(StageError) as caught:
        restore(str(tmp_path), "step-00000009", *_trained(), "plan")
    assert str(caught.value).startswith(f"{state}: cannot be read as a training state of this version (it holds torch.")
    assert "weights_only" not in str(caught.value)
    assert not caught.value.may_pass


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
    assert "state.pt is gone or truncated; step-00000001, the checkpoint before it, is used" in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    caplog.clear()
    assert newest(str(tmp_path)) is None
    assert "state.pt is gone or truncated; there is no whole checkpoint before it" in caplog.text
    assert "is used" not in caplog.text


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
    with pytest.raises(StageError, match=r"step-00000003: of the best checkpoint so far, .* gone.*to train anew"):
        newest(str(tmp_path))


def _spoil(folder: Path, step: int, name: str = "weights.safetensors") -> None:
    """Change one byte: the size stays."""
    file = folder / f"step-{step:08d}" / name
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "state.pt", COMMIT])
def test_changed_bytes_mean_the_one_before(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path, 1, 2)
    _spoil(tmp_path, 2, name)
    found = newest(str(tmp_path), read=True)
    assert found is not None
    assert found.step == 1
    assert f"step-00000002/{name}" in caplog.text
    _spoil(tmp_path, 1, name)
    assert newest(str(tmp_path), read=True) is None


def test_a_checkpoint_damaged_after_it_was_chosen_is_chosen_again(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _spoil(tmp_path, 1)
    with pytest.raises(StorageError, match=r"weights.safetensors: damaged, its digest is not that of") as caught:
        restore(str(tmp_path), "step-00000001", *_trained(), "plan")
    assert caught.value.may_pass


def test_a_damaged_checkpoint_is_written_again_when_the_run_comes_there(tmp_path: Path) -> None:
    _save(tmp_path, 10, 20)
    whole = (tmp_path / "step-00000020" / "weights.safetensors").read_bytes()
    _spoil(tmp_path, 20)
    _save(tmp_path, 20)
    found = newest(str(tmp_path), read=True)
    assert found is not None
    assert found.step == 20
    assert (tmp_path / "step-00000020" / "weights.safetensors").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_while_a_damaged_checkpoint_is_written_again_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old and half of the new, under the old commit, must not pass for a checkpoint."""
    _save(tmp_path, 10, 20)
    _spoil(tmp_path, 20, "state.pt")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.saver.upload", lambda *_: (_ for _ in ()).throw(StorageError("killed")))
        with pytest.raises(StorageError, match="killed"):
            _save(tmp_path, 20)
    found = newest(str(tmp_path))
    assert found is not None
    assert found.step == 10


def test_a_run_that_went_back_behind_a_damaged_checkpoint_keeps_two_whole_ones(tmp_path: Path) -> None:
    _save(tmp_path, 10, 20)
    _spoil(tmp_path, 20)
    _save(tmp_path, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize(("answers", "left"), [(1, [1]), (2, [1, 2, 5])])
def test_what_is_no_longer_allowed_is_not_done(answers: int, left: list[int], tmp_path: Path) -> None:
    """Allowed when it begins, not when it would count; or when it counts, not when what is newer would go."""
    _save(tmp_path, *left[:1], *left[2:])
    allowances = iter([None] * answers)

    def allowed() -> None:
        if next(allowances, True):
            raise StageError("another driver has taken the run over")

    with pytest.raises(StageError, match="taken the run over"), Saver(str(tmp_path), allowed) as saver:
        saver.save(_snapshot(2))
    whole = sorted(path.parent.name for path in tmp_path.glob(f"*/{COMMIT}"))
    assert whole == [f"step-{step:08d}" for step in left]


def test_a_driver_that_wakes_after_another_one_has_finished_its_run_leaves_that_alone(tmp_path: Path) -> None:
    with held(str(tmp_path / "lease"), "train"):
        _save(tmp_path / "run", 35, 36)
    stale = Lease(str(tmp_path / "lease"), "its token")
    with pytest.raises(StageError, match="has ended since"), Saver(str(tmp_path / "run"), stale.check) as saver:
        saver.save(_snapshot(11))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000035", "step-00000036"]


def test_the_result_is_what_the_training_wrote_or_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    checkpoint = str(tmp_path / "step-00000001")
    with model_folder(checkpoint) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    _spoil(tmp_path, 1)
    remedy = rf"restore it from a copy, or remove {checkpoint} and run again: the training goes on from"
    with pytest.raises(StageError, match=f"weights.safetensors: damaged.*; {remedy}"), model_folder(checkpoint):
        pass
    (tmp_path / "step-00000001" / COMMIT).unlink()
    with pytest.raises(StageError, match=f"{COMMIT} is gone; {remedy}"), model_folder(checkpoint):
        pass


def test_a_best_checkpoint_that_is_damaged_is_an_error_too(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    _save(tmp_path, 4, 5, best="step-00000003")
    _spoil(tmp_path, 3)
    with pytest.raises(StageError, match=r"best checkpoint so far, .*weights.safetensors: damaged.*to train anew"):
        newest(str(tmp_path), read=True)


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    commit = tmp_path / "step-00000001" / COMMIT
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "version": 0}))
    with pytest.raises(StageError, match=r"checkpoint of version 0, this is version 1; .* to train anew"):
        newest(str(tmp_path))


@pytest.mark.parametrize("change", [{"colour": "blue"}, None])
def test_progress_of_another_version_says_so(change: dict[str, object] | None, tmp_path: Path) -> None:
    """A release may know more of a run, or less, with the files as they are."""
    _save(tmp_path, 1)
    assert progress_of(str(tmp_path), "step-00000001").metrics == {"epoch": 1.0}
    commit = tmp_path / "step-00000001" / COMMIT
    known = json.loads(commit.read_text())
    progress = {"epoch": 1} if change is None else {**known["progress"], **change}
    commit.write_text(json.dumps({**known, "progress": progress}))
    with pytest.raises(
        StageError, match=r"checkpoint of another version \(.*__init__.*\); go on with .* to train anew"
    ):
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

    monkeypatch.setattr("pipeline.training.saver.write_snapshot", waits)
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
