from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.main import app
from tests.pipeline.datasets.made import as_written, feature_store, patch_store


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three slides in a store."""
    return patch_store(tmp_path, monkeypatch)


def said(*arguments: str, code: int = 0) -> dict[str, Any]:
    told = CliRunner().invoke(app, ["store", *arguments, "--json"])
    assert told.exit_code == code, told.output
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


def test_slides_are_listed_and_shown(spec: Path) -> None:
    listed = said("ls", str(spec.parent))
    assert (listed["kind"], listed["patches"], len(listed["slides"])) == ("patches", 60, 3)
    facts = said("show", str(spec), "s2")
    assert facts["key"] in as_written(spec)
    assert facts["sources"] == [str(spec.parents[1] / "s2.png")]
    assert "0 slides are called" in said("show", str(spec), "s7", code=1)["message"]
    for command in (["ls", str(spec)], ["show", str(spec), "s0"]):
        told = CliRunner().invoke(app, ["store", *command], env={"COLUMNS": "200"})
        assert "s0.png" in told.stdout


def test_a_sample_is_a_sheet(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheets" / "a.png"
    drawn = said("sample", str(spec), "--count", "9", "--out", str(out))["patches"]
    assert all((row["x"], row["y"]) == as_written(spec)[row["key"]][row["row"]][:2] for row in drawn)
    with Image.open(out) as sheet:
        assert sheet.size == (8 * 98 - 2, 2 * 98 - 2)
    one = said("sample", str(spec), "s1", "--count", "64", "--out", str(out))["patches"]
    assert len(one) == 20
    features = feature_store(spec, tmp_path)
    assert "no pictures" in said("sample", str(features), code=1)["message"]
    assert said("ls", str(features))["slides"][0]["dim"] == 7


def test_what_no_run_uses_is_told_with_its_bytes_and_then_removed(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "old").mkdir(parents=True)
    (tmp_path / "train" / "old" / "weights").write_bytes(b"1" * 7)
    (tmp_path / "cohort.csv").write_text("slide_id,uri\na,a.png\n")
    given = ["tiling=image", f"cohort.uri={tmp_path}/cohort.csv", f"storage.root={tmp_path}"]
    assert said("rm", *given)["outcome"] == "nothing to do"
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - 8 * 86_400))
    told = said("rm", *given)
    size = sum(path.stat().st_size for path in spec.rglob("*") if path.is_file())
    assert (told["outcome"], told["bytes"], [one["uri"] for one in told["leftovers"]]) == ("dry run", size, [str(spec)])
    assert len(as_written(spec)) == 3
    assert said("rm", "--delete", *given)["outcome"] == "done"
    assert not spec.exists()
    assert (tmp_path / "train" / "old").exists()


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    for command in ("repair", "migrate"):
        told = CliRunner().invoke(app, ["store", command, str(tmp_path), "--json"])
        assert told.exit_code == 1
        assert "no patch store" in json.loads(told.stdout)["message"]
    assert "repair" in CliRunner().invoke(app, ["store"]).output
