from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from pipeline.errors import ConfigError
from pipeline.jobs.package import EXCLUDES, look_at

_SECRET = "PlantedPa55word"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    for name, size in {
        "conf/default.yaml": 11,
        "conf/cohort/mine.csv": 23,
        "pipeline/a.py": 307,
        "runs/demo/x.bin": 5000,
        "slides/a.svs": 7919,
        "slides/B.TIFF": 101,
        "pipeline/__pycache__/a.pyc": 97,
        ".git/config": 13,
        ".env": 17,
        "sub/.aws/credentials": 19,
        "key.pem": 29,
        "notes/ignored.txt": 31,
        "mlflow.db": 41,
    }.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (work / "notes" / ".gitignore").write_text("ignored.txt\n")
    return work


def test_it_is_what_ray_packs_and_holds_neither_data_nor_credentials(folder: Path, tmp_path: Path) -> None:
    package = look_at(folder, 1.0, {})
    target = tmp_path / "package.zip"
    create_package(str(folder), target, include_gitignore=True, excludes=list(EXCLUDES))
    with zipfile.ZipFile(target) as made:
        packed = {info.filename: info.file_size for info in made.infolist() if not info.is_dir()}
    assert dict(package.files) == packed
    assert list(package.files) == ["pipeline/a.py", "conf/cohort/mine.csv", "notes/.gitignore", "conf/default.yaml"]
    assert set(package.kept_back) == {
        *("runs/demo/x.bin", "slides/a.svs", "slides/B.TIFF", ".env", "sub/.aws/credentials", "key.pem", "mlflow.db")
    }
    assert package.bytes == 307 + 23 + 11 + 12


def test_too_much_is_refused_and_the_largest_are_named(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(1_200_000))
    with pytest.raises(ConfigError, match=r"1\.2 MB would travel .* largest: weights\.bin \(1\.2 MB\), pipeline/a\.py"):
        look_at(folder, 1.0, {})
    assert look_at(folder, 1.3, {}).bytes > 1_200_000


def test_a_secret_in_a_file_is_refused_without_being_told(folder: Path) -> None:
    (folder / "conf" / "mine.yaml").write_text(f"uri: http://u:{_SECRET}@host\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml holds the value of DB_PASSWORD") as caught:
        look_at(folder, 1.0, {"DB_PASSWORD": _SECRET})
    assert _SECRET not in str(caught.value)


def test_the_digest_is_of_what_travels(folder: Path) -> None:
    before = look_at(folder, 1.0, {}).digest
    (folder / "slides" / "a.svs").write_bytes(b"other")
    assert look_at(folder, 1.0, {}).digest == before
    (folder / "pipeline" / "a.py").write_bytes(b"other")
    assert look_at(folder, 1.0, {}).digest != before


def test_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        look_at(tmp_path / "absent", 1.0, {})
