"""What an invocation leaves in MLflow."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.workflow.lineage import Tracking, lineage


@pytest.fixture
def config(tmp_path: Path, mlflow_uri: str) -> Config:
    return load_config("demo", [f"storage.root={tmp_path}/runs", f"tracking.uri={mlflow_uri}"])


def test_tags_say_code_image_and_specification(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPS_IMAGE", "registry.test/ips@sha256:5f")
    monkeypatch.delenv("RAY_SUBMISSION_ID", raising=False)
    tags = lineage(config)
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert tags == {
        "config": "demo",
        "tiling_fingerprint": config.tiling.fingerprint(),
        "git_sha": head.stdout.strip(),
        "image": "registry.test/ips@sha256:5f",
    }


def test_a_password_in_an_images_name_is_no_tag(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPS_IMAGE", "https://puller:SECRET@registry.test/ips")
    assert "SECRET" not in lineage(config)["image"]


def test_an_invocation_that_runs_no_stage_leaves_nothing(config: Config) -> None:
    with ExitStack() as stack:
        tracking = Tracking(config, stack)
        tracking.sum_up([])
        assert tracking.parent is None
    assert not Path(config.storage.root).exists()


def test_a_stage_has_a_run_below_its_invocations(config: Config) -> None:
    with ExitStack() as stack:
        tracking = Tracking(config, stack)
        with tracking.child("tile", "5f", {"slides": "3"}, alone=True) as run_id:
            assert tracking.parent is not None
        tags = tracking.tracker().client.get_run(run_id).data.tags
        assert tags["mlflow.parentRunId"] == tracking.parent
        assert (tags["stage"], tags["slides"], tags["root"]) == ("tile", "3", config.storage.root)
