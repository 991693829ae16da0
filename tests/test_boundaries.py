"""What may be loaded when: checked in fresh processes, because import contracts do not see what runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


def _loaded_by(statement: str, candidates: tuple[str, ...]) -> set[str]:
    """Which of the candidate packages a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {candidates!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_ips_needs_torch_only() -> None:
    assert _loaded_by("import ips", ("ray", "mlflow", "pyarrow", "pandas", "pydantic", "pipeline")) == set()


def test_ips_imports_torch_and_the_standard_library_only() -> None:
    """Functions' own imports too, which `import ips` does not run; the contract can only name packages one by one."""
    found = set()
    for path in (Path(__file__).resolve().parents[1] / "ips").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    assert found - sys.stdlib_module_names == {"ips", "torch"}


@pytest.mark.parametrize(
    "module", ["pipeline.tiling.slide", "pipeline.store.patches", "pipeline.cohort.table", "pipeline.config.compose"]
)
def test_tile_workers_load_no_torch(module: str) -> None:
    assert _loaded_by(f"import {module}", ("torch", "mlflow", "ray")) == set()


def test_the_ray_data_graph_loads_no_torch_of_ours() -> None:
    assert _loaded_by("import pipeline.ingest.graph", ("mlflow", "ips")) == set()


@pytest.mark.parametrize(
    ("statement", "candidates"),
    [
        ("import pipeline", ("torch", "ray", "mlflow", "pyarrow", "numpy", "pydantic", "s3fs")),
        ("from pipeline import Config, load_config", ("torch", "ray", "mlflow", "s3fs")),
        ("from pipeline import open_store", ("torch", "ray", "mlflow", "s3fs", "duckdb")),
    ],
)
def test_what_a_notebook_imports_loads_no_more_than_it_uses(statement: str, candidates: tuple[str, ...]) -> None:
    assert _loaded_by(statement, candidates) == set()


def test_a_forbidden_import_would_be_seen() -> None:
    assert _loaded_by("import ips.bag, pyarrow", ("pyarrow", "ray")) == {"pyarrow"}
