"""The Dockerfile without Docker: linted, and its steps replayed in a folder and a venv of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _instructions() -> Iterator[tuple[str, str]]:
    """Name and text of each, in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


def test_it_is_clean() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_last_user_is_no_root_and_a_number() -> None:
    """Kubernetes refuses `runAsNonRoot` for a name, which could be root's."""
    assert [rest for name, rest in _instructions() if name == "USER"][-1] == "1000"


@pytest.mark.slow
def test_its_steps_make_a_healthy_installation(tmp_path: Path) -> None:
    """Over the dependencies of this interpreter: what a registry would give is not fetched again."""
    image, place = tmp_path / "image", tmp_path / "venv"
    venv.create(place, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (packages / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PATH": f"{place / 'bin'}:{env['PATH']}", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    work, ran = image, 0
    for name, rest in _instructions():
        rest = rest.replace("/tmp/", f"{tmp_path}/").replace("/opt/ips", str(image / "opt/ips"))
        if name == "WORKDIR":
            work = Path(rest) if rest.startswith(str(tmp_path)) else image / rest.lstrip("/")
            work.mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            env |= dict(part.split("=", 1) for part in rest.split() if "$" not in part)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                _copy(ROOT / source, work / target, into=len(sources) > 1)
        elif name == "RUN":
            done = subprocess.run(
                ["bash", "-euc", rest], cwd=work, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            ran += 1
        else:
            assert name in {"ARG", "FROM", "USER", "CMD"}
    assert ran == 2
    said = subprocess.run(["ips", "--help"], cwd=work, env=env, capture_output=True, text=True, check=True).stdout
    assert "submit" in said


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target / source.name if into else target)
