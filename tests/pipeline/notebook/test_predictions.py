from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StageError
from pipeline.notebook.predictions import predict
from pipeline.notebook.stages import Run
from tests.pipeline.small import small_config, write_cohort, write_model


def test_predictions_are_tables_and_pictures(tmp_path: Path) -> None:
    write_cohort(tmp_path, ["no", "yes"])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, small_config())
    found = predict(str(folder), [tmp_path / "s0.png", f"{tmp_path}/bad.png"], out=tmp_path / "out")
    assert found.table["slide_id"].to_pylist() == ["s0", "bad"]
    assert list(found.failed) == ["bad"]
    attention = found.attention("s0")
    assert {"row", "x", "y", "attention", "selected", "effect_tumour_yes"} <= set(attention.column_names)
    assert np.isclose(np.sum(attention["attention"].to_numpy()), 1.0)
    assert found.heatmap("s0").width > 100
    html = found._repr_html_()
    assert "2 slides by" in html
    assert html.count("data:image/png") == 1
    with pytest.raises(StageError, match="no prediction of 'bad'"):
        found.heatmap("bad")
    with pytest.raises(StageError, match="was not asked for; there are s0"):
        found.attention("s1")
    one = predict(str(folder), tmp_path / "s1.png", out=tmp_path / "one")
    assert one.table.num_rows == 1


def test_a_run_without_a_model_predicts_nothing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nothing is trained yet"):
        predict(Run(small_config(), "done", {}, None, None), "a.png", out=tmp_path)
