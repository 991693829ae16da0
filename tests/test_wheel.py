"""The package without its checkout: built, installed into a venv of its own over the dependencies, used elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a venv that holds the wheel; the dependencies are those of this interpreter."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, ROOT, cwd=place)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", with_pip=False, symlinks=True)
    packages = place / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without its editable installs
    python = place / "venv" / "bin" / "python"
    _run(*pip, "--python", python, "install", "--no-deps", "--ignore-installed", wheel, cwd=place)
    return python.parent


def _files(built: Path) -> set[str]:
    if built.suffix == ".whl":
        return set(zipfile.ZipFile(built).namelist())
    with tarfile.open(built) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_archives_hold_what_they_must_and_nothing_else(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "hatchling", "build", "--directory", tmp_path, cwd=ROOT)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    tracked = set(_run("git", "ls-files", cwd=ROOT).splitlines())
    package = {name for name in tracked if name.startswith(("ips/", "pipeline/"))}
    conf = {name for name in tracked if name.startswith("conf/")}
    assert {name for name in _files(wheel) if ".dist-info/" not in name} == package | {
        f"pipeline/{name}" for name in conf
    }
    tools = {".dockerignore", ".gitignore", ".pre-commit-config.yaml"}
    assert _files(source) - {"PKG-INFO"} - tools == tracked - tools


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_wheel_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    where = _run(
        installed / "python", "-c", "import ips, pipeline; print(ips.__file__, pipeline.__file__)", cwd=tmp_path
    )
    assert where.count(str(installed.parent)) == 2
    assert _run(installed / "ips", "--version", cwd=tmp_path).strip() == "0.1.0"
    assert '"stage": "demo"' in _run(installed / "ips", "plan", "--config", "demo", "--json", cwd=tmp_path)
    assert '"healthy": true' in _run(installed / "ips", "doctor", "--json", cwd=tmp_path)
    load = "from pipeline.config.compose import load_config as load"
    listed = f"{load}; print(load('camelyon16', ['embed.encoder.weights=w']).cohort.uri)"
    uri = Path(_run(installed / "python", "-c", listed, cwd=tmp_path).strip())
    assert uri.is_file()
    assert installed.parent in uri.parents
    for page in ("report.html", "quality.html"):
        code = f"from importlib.resources import files; print(files('pipeline.results').joinpath('{page}').is_file())"
        assert _run(installed / "python", "-c", code, cwd=tmp_path).strip() == "True"
