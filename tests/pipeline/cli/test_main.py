from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from pipeline.cli.main import _print_summary, app, where_runs_are_shown
from pipeline.config.compose import load_config
from pipeline.errors import Interrupted
from pipeline.workflow.run import plan
from tests.pipeline.small import small_config, write_model, write_slide


def _ips(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_readme_lists_the_commands_that_there_are() -> None:
    text = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    table = text[text.index("| command | does |") : text.index("Logs go to stderr")]
    listed = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)", row.partition(" | ")[0])]
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["run", "export"])
def test_a_command_that_takes_a_config_has_its_options_after_its_own(command: str) -> None:
    options = [parameter.name for parameter in get_command(app).commands[command].params]  # type: ignore[attr-defined]
    own = {"run": [], "export": ["out", "tool", "features"]}[command]
    assert options == [*own, "config", "overrides", "config_dir", "as_json", "log_format"]


def test_features_need_no_labels(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("slide_id,uri\na,a.png\n")
    result = _ips(
        "embed", f"cohort.uri={tmp_path / 'cohort.csv'}", f"storage.root={tmp_path / 'root'}", "embed.batch=0"
    )
    assert result.exit_code == 2
    assert "1 problem\n  - embed.batch: " in result.stderr
    planned = plan(load_config("default", [f"cohort.uri={tmp_path / 'cohort.csv'}"]), "embed")
    assert [item.stage for item in planned] == ["tile", "embed"]


def test_a_config_error_exits_with_2_and_says_all(tmp_path: Path) -> None:
    result = _ips("run", "--config", "demo", f"storage.root={tmp_path}", "train.epohcs=1", "train.lr=-1", "--json")
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["error"] == "ConfigError"
    assert "train.epohcs: unknown key; did you mean epochs?" in said["message"]
    assert "train.lr: " in said["message"]
    assert "error: config demo: 2 problems" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_plan_says_what_would_run_and_changes_nothing(tmp_path: Path) -> None:
    result = _ips("plan", "--config", "demo", f"storage.root={tmp_path}", "--json")
    assert result.exit_code == 0
    stages = {item["stage"]: item["action"] for item in json.loads(result.stdout)["stages"]}
    assert stages == {
        "demo": "run",
        "tile": "unknown",
        "train": "unknown",
        "evaluate": "unknown",
        "register": "unknown",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "tile", "embed", "train", "evaluate", "register", "plan"])
def test_a_missing_cohort_is_named(command: str, tmp_path: Path) -> None:
    result = _ips(command, f"cohort.uri={tmp_path / 'absent.csv'}", f"storage.root={tmp_path / 'root'}", "--json")
    assert result.exit_code in (1, 2)
    assert "absent.csv" in json.loads(result.stdout)["message"]


def test_a_bad_cohort_exits_with_2(tmp_path: Path) -> None:
    cohort = tmp_path / "cohort.csv"
    cohort.write_text("slide_id,uri,label\na,a.svs,0\na,b.svs,\n")
    result = _ips("run", f"cohort.uri={cohort}", f"storage.root={tmp_path / 'root'}")
    assert result.exit_code == 2
    assert "row 3" in result.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a,a.png,0,train", "b,b.png,0,train", "c,c.png,1,test"], "split train has only class '0'"),
        (["a,a.png,0,train", "b,b.png,1,train"], "split test has no slide (train 2, val 0, test 0)"),
        (["a,a.png,0,train", "b,b.png,1,train", "c,c.png,1,test"], "split test has only class '1'"),
    ],
)
def test_what_cannot_be_trained_or_tested_is_refused_before_any_tiling(
    rows: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,label,split", *rows]) + "\n")
    result = _ips("run", f"cohort.uri={tmp_path / 'cohort.csv'}", f"storage.root={tmp_path / 'root'}")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "root").exists()


def test_doctor_finds_this_machine_healthy_and_a_bad_config_not(tmp_path: Path) -> None:
    healthy = _ips("doctor", f"storage.root={tmp_path}", "--json")
    checks = {check["name"]: check for check in json.loads(healthy.stdout)["checks"]}
    assert healthy.exit_code == 0, healthy.stdout
    assert not (tmp_path / ".doctor").exists()
    assert set(checks) >= {
        "python",
        "torch",
        "ray",
        "openslide",
        "jpeg",
        "disk",
        "config",
        "devices",
        "storage",
        "mlflow",
    }
    sick = _ips("doctor", f"storage.root={tmp_path}", "cluster.gpus_per_worker=1", "--json")
    assert sick.exit_code == 1
    checks = {check["name"]: check for check in json.loads(sick.stdout)["checks"]}
    assert "cluster.gpus_per_worker=0" in checks["devices"]["remedy"]


def test_demo_writes_a_cohort(tmp_path: Path) -> None:
    result = _ips("demo", str(tmp_path / "cohort"), "--slides", "12", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert Path(said["cohort"]).is_file()
    assert said["slides"] == 12


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_codes(signum: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object) -> None:
        os.kill(os.getpid(), signum)
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr("pipeline.cli.console.load_config", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    result = _ips("run", "--config", "demo")
    assert result.exit_code == code
    assert "run the same command to go on" in result.stderr
    assert signal.getsignal(signal.SIGTERM) == before
    assert Interrupted(signum).exit_code == code


def test_a_slide_without_prediction_is_an_exit_code_and_the_others_are_predicted(tmp_path: Path) -> None:
    model = write_model(tmp_path, small_config())
    write_slide(tmp_path / "good.png", 0)
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    slides = [str(tmp_path / name) for name in ("good.png", "bad.svs")]
    result = _ips("predict", "--model", str(model), "--out", str(tmp_path / "out"), *slides, "--json")
    assert result.exit_code == 3
    assert list(json.loads(result.stdout)["failed"]) == ["bad"]
    assert (tmp_path / "out" / "predictions.csv").read_text().count("good") == 3
    assert (tmp_path / "out" / "slides" / "good" / "overlay.png").exists()
    assert _ips("predict", "--model", str(model), "--out", str(tmp_path / "out"), slides[0]).exit_code == 0


def test_the_summary_has_a_word_on_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"model": "demo", "version": "3", "alias": "champion", "previous": None}
    done = {"outcome": "done", "seconds": 2.0, "metrics": {}, "outputs": {}, "facts": facts}
    _print_summary({"stages": {"register": done}, "outcome": "done"}, load_config("demo", []))
    assert "model demo, version 3, alias champion " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://mlflow.example.org", "http://mlflow.example.org"),
        ("sqlite:////a b/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
        ("postgresql://mlflow@db/mlflow", "mlflow ui --backend-store-uri postgresql://mlflow@db/mlflow"),
    ],
)
def test_the_last_line_shows_the_runs_as_it_stands(uri: str, line: str) -> None:
    assert where_runs_are_shown(uri) == line
