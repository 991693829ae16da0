from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.model.checkpoint import Progress, load_checkpoint, save_checkpoint
from pipeline.model.folder import read_config, save_model

CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "t", "column": "label"}]})


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_a_checkpoint_restores_weights_optimiser_and_progress(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = _stepped(model)
    save_checkpoint(tmp_path, model, optimizer, CONFIG, Progress(4, 17, "digest"))
    fresh = nn.Linear(3, 2)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters())
    assert load_checkpoint(tmp_path, fresh, fresh_optimizer, "digest") == Progress(4, 17, "digest")
    assert torch.equal(fresh.weight, model.weight)
    moment, expected = (o.state[o.param_groups[0]["params"][0]]["exp_avg"] for o in (fresh_optimizer, optimizer))
    assert torch.equal(moment, expected)
    assert read_config(tmp_path) == CONFIG


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path, model, _stepped(model), CONFIG, Progress(4, 17, "digest"))
    with pytest.raises(StageError, match=r"another plan \(digest digest, now other\).*folder of the run.*train anew"):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), "other")


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = _stepped(model)
    save_model(tmp_path, model.state_dict(), CONFIG)
    torch.save({"optimizer": optimizer.state_dict(), "progress": {"epochs": 4}}, tmp_path / "state.pt")
    with pytest.raises(StageError, match=r"state.pt: cannot be read as a training state of this version"):
        load_checkpoint(tmp_path, model, optimizer, "digest")


def test_a_forged_state_is_refused_without_running_it(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = _stepped(model)
    save_checkpoint(tmp_path, model, optimizer, CONFIG, Progress(4, 17, "digest"))
    torch.save({"optimizer": nn.Linear(2, 2), "progress": {}}, tmp_path / "state.pt")
    with pytest.raises(StageError) as caught:
        load_checkpoint(tmp_path, model, optimizer, "digest")
    assert str(caught.value).startswith(
        f"{tmp_path}/state.pt: cannot be read as a training state of this version (it hol"
    )
    assert "no tensor and was not run); go on with the version that wrote it, or remove the run" in str(caught.value)
    assert not caught.value.may_pass  # begun again, it is no better
