from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli.console import errors, print_table
from pipeline.cli.main import app
from pipeline.errors import DataBudgetError


def test_an_error_is_a_message_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, errors(as_json=True):
        raise DataBudgetError("too many")
    assert caught.value.exit_code == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"outcome": "failed", "error": "DataBudgetError", "message": "too many", "exit_code": 3}
    assert "error: too many" in err


def test_a_table_shows_text_whole_and_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path, remedy = f"/data/[old]/{'0123456789abcdef' * 6}/[/x]", "ray[data]==2.60"
    print_table(("where", "remedy"), [(path, remedy)])
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
    shown = ["".join(cell[column] for cell in cells if cell) for column in range(2)]
    assert shown == [path, remedy]


def test_a_signal_is_an_interruption_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught, errors(as_json=False):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "tracking.uri=http://svc:Pa55@h"],
        ["plan", "http://svc:Pa55@h"],
        ["http://svc:Pa55@h"],
        ["predict", "--model", "m", "--mpp", "http://svc:Pa55@h"],
        ["predict", "--model", "m", "s3://KEY:my Pa55@b/a.svs"],
        ["plan", "--config", "https://h/x?token=Pa55"],
        ["verify", "s3://b/k?X-Amz-Signature=Pa55"],
        ["demo", "http://svc:Pa55@h"],
    ],
)
def test_no_argument_may_hold_a_credential(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 2
    assert "Pa55" not in result.stdout + result.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in json.loads(result.stdout)["message"]
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_log_is_masked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with errors(as_json=False):
        logging.getLogger("botocore").warning("no answer from %s", "https://svc:Pa55@minio")
    said = capsys.readouterr().err
    assert "no answer from https://***@minio" in said
