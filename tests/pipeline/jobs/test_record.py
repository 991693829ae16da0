from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli.console import errors
from pipeline.errors import DataBudgetError
from pipeline.jobs.record import NONCE, RECORD, read_result, record_uri, recorded
from pipeline.logs import about


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    found = record_uri(str(tmp_path / "root"), "name-0123-1")
    monkeypatch.setenv(RECORD, found)
    monkeypatch.setenv(NONCE, "n1")
    return found


def _fails() -> None:
    about(run="abc")
    with errors(as_json=False):
        raise DataBudgetError("too many; see http://svc:PlantedPa55word@host/x")


def test_the_code_the_reason_and_the_run_are_kept(uri: str) -> None:
    program = typer.Typer()
    program.command()(_fails)
    with pytest.raises(SystemExit, match="3"), recorded():
        program([])
    about(run=None)
    result = read_result(uri, "n1")
    assert result is not None
    assert (result.code, result.run_id) == (3, "abc")
    assert result.reason == "too many; see http://***@host/x"
    assert uri.endswith("/root/jobs/name-0123-1.json")


def test_a_good_end_and_an_unforeseen_one(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded():
        pass
    result = read_result(uri, "n1")
    assert result is not None
    assert (result.code, result.reason, result.run_id) == (0, "", None)
    monkeypatch.setenv(RECORD, uri)
    with pytest.raises(ZeroDivisionError), recorded():
        _ = 1 / 0
    other = json.loads(Path(uri).read_text())
    assert (other["code"], other["reason"], other["nonce"]) == (1, "ZeroDivisionError: division by zero", "")


def _found_bad() -> None:
    raise typer.Exit(1)


def test_a_command_that_has_said_all_leaves_its_code(uri: str) -> None:
    program = typer.Typer()
    program.command()(_found_bad)
    with pytest.raises(SystemExit, match="1"), recorded():
        program([])
    result = read_result(uri, "n1")
    assert result is not None
    assert (result.code, result.reason) == (1, "")


def test_another_cluster_s_job_of_the_same_id_is_not_this_one(uri: str) -> None:
    with pytest.raises(SystemExit), recorded():
        sys.exit(4)
    assert read_result(uri, "n2") is None
    found = read_result(uri, "n1")
    assert found is not None
    assert found.code == 4


def test_nothing_is_written_outside_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with recorded():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_does_not_take_it_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(RECORD, str(tmp_path / "file" / "jobs" / "x.json"))
    with recorded():
        pass
    assert "the job's record was not written" in caplog.text
