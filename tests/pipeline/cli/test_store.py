from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli.main import app


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    for command in ("repair", "migrate"):
        told = CliRunner().invoke(app, ["store", command, str(tmp_path), "--json"])
        assert told.exit_code == 1
        assert "no patch store" in json.loads(told.stdout)["message"]
    assert "repair" in CliRunner().invoke(app, ["store"]).output
