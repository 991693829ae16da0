from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.model.folder import load_weights, read_config, save_model

CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "t", "column": "label"}]})


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, nn.Linear(3, 2).state_dict(), CONFIG)
    with pytest.raises(
        StageError, match=r"missing keys \['0.bias', '0.weight'\], unexpected keys \['bias', 'weight'\]"
    ):
        load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path)


def test_absent_or_damaged_files_are_stage_errors(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="config.json: cannot be read"):
        read_config(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(StageError, match="weights.safetensors: cannot be read"):
        load_weights(nn.Linear(3, 2), tmp_path)
