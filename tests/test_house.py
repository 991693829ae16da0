"""The house: rooms that say what they are for, files that do one job, a test beside every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_FUNCTION, MAX_FILES, MIN_FILES = 350, 60, 14, 3
SAY_NOTHING = {"base", "common", "core", "helpers", "misc", "runtime", "shared", "util", "utils"}


def _rooms(root: Path) -> list[Path]:
    return sorted(p.parent for top in ("ips", "pipeline") for p in (root / top).glob("*/__init__.py"))


def _modules(root: Path) -> Iterator[Path]:
    for top in ("ips", "pipeline"):
        yield from sorted(p for p in (root / top).rglob("*.py") if not p.name.startswith("__"))


def _sizes(root: Path) -> Iterator[str]:
    """Files and functions that no longer fit one job, or one screen."""
    for path in _modules(root):
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_LINES:
            yield f"{path.relative_to(root)}: {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                long = (node.end_lineno or node.lineno) - node.lineno + 1
                if long > MAX_FUNCTION:
                    yield f"{path.relative_to(root)}: {node.name} has {long} lines"


def _room_faults(root: Path) -> Iterator[str]:
    """Rooms too full, too empty, badly named, or silent about their job."""
    for room in _rooms(root):
        name, files = room.relative_to(root), [p for p in room.iterdir() if p.suffix == ".py"]
        if not MIN_FILES <= len(files) - 1 <= MAX_FILES:
            yield f"{name}: {len(files) - 1} modules"
        if room.name in SAY_NOTHING:
            yield f"{name}: a name that says nothing"
        body = ast.parse((room / "__init__.py").read_text()).body
        if len(body) != 1 or len((ast.get_docstring(ast.Module(body, [])) or "").splitlines()) not in range(2, 7):
            yield f"{name}: its __init__.py holds a docstring of two to five lines, and nothing else"


def _untested(root: Path) -> Iterator[str]:
    for path in _modules(root):
        mirrored = root / "tests" / path.relative_to(root).with_name(f"test_{path.name}")
        if not mirrored.is_file():
            yield f"{path.relative_to(root)}: no {mirrored.relative_to(root)}"


def test_files_and_functions_are_small() -> None:
    assert list(_sizes(ROOT)) == []


def test_rooms_say_what_they_are_for() -> None:
    assert list(_room_faults(ROOT)) == []


def test_the_readme_names_every_module_beside_its_room() -> None:
    rows = (ROOT / "pipeline" / "README.md").read_text().splitlines()
    for room in _rooms(ROOT):
        if room.parent.name == "pipeline":
            (row,) = [row for row in rows if row.startswith(f"| `{room.name}` ")]
            missing = [p.stem for p in _modules(ROOT) if p.parent == room and f"`{p.stem}`" not in row]
            assert missing == [], room


def test_every_module_has_a_test_of_its_name() -> None:
    assert list(_untested(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("pipeline/loud/one.py", "x = 1\n" * (MAX_LINES + 1), "one.py: 351 lines"),
        ("pipeline/loud/one.py", "def f() -> None:\n" + "    x = 1\n" * MAX_FUNCTION, "f has 61 lines"),
        ("pipeline/loud/__init__.py", '"""Loud."""\nfrom pipeline.loud.one import x\n', "nothing else"),
        ("pipeline/loud/__init__.py", "", "nothing else"),
        ("pipeline/utils/__init__.py", '"""A job.\n\nIn and out.\n"""\n', "a name that says nothing"),
        ("pipeline/loud/two.py", "", "no tests/pipeline/loud/test_two.py"),
    ],
)
def test_what_breaks_the_house_is_seen(tmp_path: Path, file: str, text: str, fault: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = [*_sizes(tmp_path), *_room_faults(tmp_path), *_untested(tmp_path)]
    assert any(fault in line for line in found), found


def test_a_full_room_is_seen(tmp_path: Path) -> None:
    room = tmp_path / "ips" / "full"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A job.\n\nIn and out.\n"""\n')
    for number in range(MAX_FILES + 1):
        (room / f"file_{number}.py").touch()
    assert list(_room_faults(tmp_path)) == ["ips/full: 15 modules"]
