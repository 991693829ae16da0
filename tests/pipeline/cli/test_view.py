from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli.main import app


def test_what_cannot_be_shown_is_said_with_its_remedy(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["view", str(tmp_path)])
    assert done.exit_code == 1
    assert "neither the --out of predict nor a patch store" in done.output


def test_a_credential_is_refused_before_anything_is_read() -> None:
    done = CliRunner().invoke(app, ["view", "https://name:hunter2@host/out"])
    assert done.exit_code == 2
    assert "hunter2" not in done.output
