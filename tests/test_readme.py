"""The commands of the READMEs, as they stand there: on a fresh home, in a checkout, one after another.

A block that cannot be run here says so in its first line, `# not run by the tests: REASON`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from tests.processes import free_port

REPO = Path(__file__).resolve().parents[1]
SHOWN = {"text", "csv"}  # not commands
ELSEWHERE = {
    ("ips/README.md", "python"),  # tests/ips/test_readme.py
    ("pipeline/store/README.md", "python"),  # tests/pipeline/store/test_format.py
}
MARKER = "# not run by the tests: needs "
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _readmes() -> list[Path]:
    """That of the whole first."""
    below = [path for top in ("conf", "ips", "pipeline") for path in (REPO / top).rglob("README.md")]
    return [REPO / "README.md", *sorted(below)]


def _blocks() -> list[tuple[str, str, str]]:
    """File, language and text of every block."""
    return [
        (str(path.relative_to(REPO)), language, text)
        for path in _readmes()
        for language, text in _BLOCK.findall(path.read_text())
    ]


def _commands() -> list[str]:
    """What is run: every block of a shell that is not marked, without the installation, which CI does by that line."""
    blocks = [text for _, language, text in _blocks() if language == "bash" and not text.startswith(MARKER)]
    return ["\n".join(line for line in text.splitlines() if not line.startswith("pip install")) for text in blocks]


def test_every_block_is_run_or_says_why_not() -> None:
    for file, language, text in _blocks():
        if language in SHOWN or (file, language) in ELSEWHERE:
            continue
        assert language in ("bash", "yaml") or text.startswith(MARKER), f"{file}: {language}\n{text}"
    assert len(_commands()) >= 4
    installs = [line for _, _, text in _blocks() for line in text.splitlines() if line.startswith("pip install")]
    ran = (REPO / ".ci" / "run").read_text()
    assert all(line.removeprefix("pip install ") in ran for line in installs)


def test_what_is_not_run_is_at_least_composed() -> None:
    """Commands with buckets and slides of somebody else's: their arguments are good."""
    marked = [text for _, language, text in _blocks() if language == "bash" and text.startswith(MARKER)]
    lines = [line for text in marked for line in text.replace("\\\n", " ").splitlines() if "-m pipeline run" in line]
    assert len(lines) >= 2
    for line in lines:
        assert load_config("default", line.partition(" run ")[2].split()).name == "mystudy"


def test_the_yaml_of_conf_is_valid() -> None:
    (text,) = [text for file, language, text in _blocks() if (file, language) == ("conf/README.md", "yaml")]
    config = Config.model_validate({"name": "n", "cohort": {"uri": "c.csv"}, **yaml.safe_load(text)})
    assert len(config.tasks) == 5


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A checkout whose demo is small, and the environment of somebody who has just logged in, with an empty home."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    home.mkdir()
    for name in ("ips", "pipeline", "conf", "pyproject.toml", ".rayignore"):
        source = REPO / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, checkout / name, ignore=ignored) if source.is_dir() else shutil.copy(source, checkout)
    _change(checkout / "conf" / "cohort" / "demo.yaml", {"demo": {"slides": 24, "seed": 0}})
    _change(checkout / "conf" / "train" / "demo.yaml", {"epochs": 2, "explore_epochs": 0, "warmup_epochs": 1})
    short = tempfile.mkdtemp(prefix="ips", dir="/tmp")  # Ray's sockets allow 107 characters
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        yield checkout, {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "RAY_TMPDIR": short}
    finally:
        _end_processes_of(home)
        shutil.rmtree(short, ignore_errors=True)


def _change(file: Path, values: dict[str, object]) -> None:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **values}))


def _end_processes_of(home: Path) -> None:
    """Whatever the commands left running, as `ray start` does; `ray stop` would end the Ray of others as well."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                process.kill()


def _on_free_ports(script: str) -> str:
    """Others may hold the usual ports of Ray and of the server here; nothing else of the commands is changed."""
    head, dashboard, client, agent, server = (str(free_port()) for _ in range(5))
    ports = f"--port={head} --dashboard-port={dashboard} --ray-client-server-port={client} "
    ports += f"--dashboard-agent-listen-port={agent} --num-cpus=2 --object-store-memory=200000000"
    script = script.replace("ray start --head", f"ray start --head {ports}")
    submit = "python -m pipeline submit"
    script = script.replace(submit, f"RAY_API_SERVER_ADDRESS=http://127.0.0.1:{dashboard} {submit}")
    return re.sub(r"\b8080\b", server, script)


def _run(script: str, folder: Path, env: dict[str, str]) -> str:
    """What a shell says; to a file, which what it leaves running holds open, beside the folder, which Ray uploads."""
    with (folder.parent / "said").open("w") as said:
        command = ["bash", "-euxo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=folder, env=env, stdout=said, stderr=said, timeout=800, check=False)
        text = (folder.parent / "said").read_text()
    assert done.returncode == 0, text[-6000:]
    return text


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_commands_run_on_a_fresh_home(machine: tuple[Path, dict[str, str]]) -> None:
    checkout, env = machine
    said = _run(_on_free_ports("\n".join(_commands())), checkout, env)
    assert len(list(checkout.glob("runs/demo/reports/*/report.html"))) == 1
    assert len(list(checkout.glob("predictions/slides/demo-000*/overlay.png"))) == 10
    home = Path(env["HOME"])
    assert len(list(home.glob("demo/reports/*/report.html"))) == 1
    assert (home / ".ray" / "auth_token").read_text() not in said
    (begin,) = (match.start() for match in re.finditer(r'^\{"predictions": ', said, re.MULTILINE))
    answer, _ = json.JSONDecoder().raw_decode(said, begin)  # curl ends no line, so the next command stands behind it
    good, bad = answer["predictions"]
    assert (good["error"], good["uri"]) == (None, "runs/demo/cohort/slides/demo-0001.tif")
    assert "this host does not serve files from there" in bad["error"]

    (shows,) = {line for line in said.splitlines() if line.startswith("mlflow ui ") and str(checkout) in line}
    port = free_port()
    with subprocess.Popen(["bash", "-c", f"exec {shows} --port {port}"], cwd=home, env=env, stderr=subprocess.DEVNULL):
        try:
            _wait_for(f"http://127.0.0.1:{port}/health")
        finally:
            _end_processes_of(home)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"{url} does not answer")
