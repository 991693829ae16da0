from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner, Result

from pipeline.cli.jobs import inner_config
from pipeline.cli.main import app
from pipeline.errors import ConfigError

CONF = Path(__file__).resolve().parents[3] / "conf"


def _ips(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_inner_command_s_own_options_choose_the_config(tmp_path: Path) -> None:
    arguments = ["plan", "--json", "-c", "demo", f"storage.root={tmp_path}", "seed=5"]
    config = inner_config(get_command(app), arguments, Path())
    assert (config.name, config.seed, config.storage.root) == ("demo", 5, str(tmp_path))


def test_the_config_is_the_one_that_the_job_will_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of the folder in which it is submitted, which does not travel."""
    for name, seed in (("here", 7), ("travels", 8)):
        shutil.copytree(CONF, tmp_path / name / "conf")
        (tmp_path / name / "conf" / "demo.yaml").write_text(
            (CONF / "demo.yaml").read_text().replace("seed: 0", f"seed: {seed}")
        )
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments, program = ["run", "-c", "demo", f"storage.root={tmp_path}"], get_command(app)
    found = [inner_config(program, arguments, tmp_path / name).seed for name in ("here", "travels", "bare")]
    assert found == [7, 8, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "no such command; one of demo, doctor"),
        (["submit", "run"], "no such command"),
        (["verify", "store"], "takes no config"),
        (["run", "--colour"], "--colour"),
        (["run", "--config", "demo"], "storage.root: 'runs/demo' is relative inside a Ray job"),
        (["run", "--config-dir", "/elsewhere"], "is not below the working directory"),
    ],
)
def test_what_cannot_be_submitted_is_refused_here(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        inner_config(get_command(app), arguments, Path())
    assert words in str(caught.value)


def test_a_dry_run_lists_what_would_travel(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a.svs").write_bytes(b"slide")
    root = f"storage.root={tmp_path / 'root'}"
    result = _ips("submit", "--dry-run", "--json", "--working-dir", str(tmp_path), "run", "--config", "demo", root)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["files"], said["left"]) == ({"a.py": 6}, {"a.svs": 5})
    shown = _ips("submit", "--dry-run", "--working-dir", str(tmp_path), "run", "--config", "demo", root)
    assert "1 files, 0.00 MB would travel" in shown.stdout
    assert not (tmp_path / "root").exists()


def test_a_manifest_comes_from_the_config_that_runs(tmp_path: Path) -> None:
    given = ("--config", "demo", f"storage.root={tmp_path}", "deploy.image=i:1")
    (manifest,) = yaml.safe_load_all(_ips("manifest", "cronjob", *given).stdout)
    command = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["python", "-m", "pipeline", "run", *given]
    refused = _ips("manifest", "cronjob", "--config", "demo", f"storage.root={tmp_path}")
    assert refused.exit_code == 2
    assert "deploy.image: is required" in refused.stderr
