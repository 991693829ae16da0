"""Bad cohorts and bad storage, through the command: a message that names what to mend, an exit code, no traces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from tests.s3 import S3Server, serve_s3

GOOD = "slide_id,uri,patient_id,split,label\n" + "".join(
    f"s{i},s{i}.tiff,p{i},{'train' if i < 6 else 'test'},{i % 2}\n" for i in range(12)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("slides")
        (server.folder / "slides" / "cohort.csv").write_text(GOOD)
        yield server


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


def run(cohort: str, root: str) -> tuple[int, str]:
    """Exit code and message of `run`."""
    arguments = ["run", f"cohort.uri={cohort}", f"storage.root={root}", "--json"]
    result = CliRunner().invoke(app, arguments)
    said = json.loads(result.stdout)
    return result.exit_code, f"{said['error']}: {said['message']}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("label", "tumour"),
            "missing column 'label'; found 'slide_id', 'uri', 'patient_id', 'split', 'tumour'",
        ),
        (GOOD.replace("s3,s3", "s2,s3"), "rows 4, 5: slide_id 's2' is not unique"),
        (GOOD.replace("p7,", "p1,"), "rows 3, 9: patient 'p1' stands in 2 splits (train, test)"),
        (GOOD.replace(",1\n", ",NaN\n", 1), "row 3: no label in column 'label'"),
        (GOOD.replace(",1\n", ",maybe\n", 1), "row 3: column 'label': 'maybe' (1 row) is not a class of task"),
        ("slide_id,uri,label\n", "no rows below the header"),
        ("", "the file is empty (0 bytes)"),
    ],
    ids=["column", "duplicate", "patient", "nan", "value", "no rows", "zero bytes"],
)
def test_a_bad_cohort(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "cohort.csv").write_text(text)
    code, message = run(str(tmp_path / "cohort.csv"), str(tmp_path / "root"))
    assert code == 2
    assert message.startswith(f"CohortError: {tmp_path}/cohort.csv: 1 problem\n")
    assert expected in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["cohort.csv"]


def test_every_problem_at_once(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text(GOOD.replace("s3,s3", "s2,s3").replace(",1\n", ",\n", 2) + "x,,p8,dev,0\n")
    code, message = run(str(tmp_path / "cohort.csv"), str(tmp_path / "root"))
    assert code == 2
    assert message.count("\n  - ") == 4


@pytest.mark.parametrize(("name", "reason"), [("gone.csv", "it does not exist"), ("", "it is a folder; name a file")])
def test_no_cohort_file(tmp_path: Path, name: str, reason: str) -> None:
    code, message = run(str(tmp_path / name), str(tmp_path / "root"))
    assert code == 1
    assert message.startswith(f"StorageError: cannot read {str(tmp_path / name).rstrip('/')}: {reason}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("place", ["cohort", "root"])
class TestBucket:
    """The cohort or the root lies on S3; the other one is local, and stays as it is."""

    def attempt(self, place: str, uri: str, tmp_path: Path) -> str:
        (tmp_path / "cohort.csv").write_text(GOOD)
        cohort = uri if place == "cohort" else str(tmp_path / "cohort.csv")
        code, message = run(cohort, uri if place == "root" else str(tmp_path / "root"))
        assert code == 1
        assert message.startswith("StorageError: cannot ")
        assert uri in message
        assert [entry.name for entry in tmp_path.iterdir()] == ["cohort.csv"]
        return message

    def test_no_such_bucket(self, place: str, tmp_path: Path) -> None:
        message = self.attempt(place, "s3://absent-bucket/file.csv", tmp_path)
        assert "bucket absent-bucket does not exist" in message

    @pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_credentials(
        self, place: str, variable: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "WRONG")
        message = self.attempt(place, "s3://slides/cohort.csv", tmp_path)
        assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in message
        assert (server.folder / "slides" / "cohort.csv").read_text() == GOOD

    def test_no_credentials(self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        message = self.attempt(place, "s3://slides/cohort.csv", tmp_path)
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message

    @pytest.mark.slow
    def test_dead_endpoint(self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        message = self.attempt(place, "s3://slides/cohort.csv", tmp_path)
        assert "the endpoint (http://127.0.0.1:1) cannot be reached" in message
        assert "check AWS_ENDPOINT_URL" in message
