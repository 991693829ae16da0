"""The house: rooms that say what they are for, files that do one job, a test beside every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_FUNCTION, MAX_FILES, MIN_FILES, WIDTH = 350, 60, 14, 3, 120
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


def _documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(path for top in ("conf", "ips", "pipeline") for path in (root / top).rglob("*.md"))]


def _is_there(root: Path, name: str) -> bool:
    """Whether a dotted name is a package or module below the root, or a word of a module, or what a package exports."""
    place = root
    for part in name.split("."):
        if place.is_dir() and ((place / part).is_dir() or (place / f"{part}.py").is_file()):
            place = place / part if (place / part).is_dir() else place / f"{part}.py"
        elif place.is_dir():
            return f'"{part}"' in (place / "__init__.py").read_text()
        else:
            return re.search(rf"\b{part}\b", place.read_text()) is not None
    return True


def test_files_and_functions_are_small() -> None:
    assert list(_sizes(ROOT)) == []


def test_rooms_say_what_they_are_for() -> None:
    assert list(_room_faults(ROOT)) == []


def test_the_readme_names_the_modules_of_each_room_and_no_others() -> None:
    text = (ROOT / "pipeline" / "README.md").read_text()
    for room in _rooms(ROOT):
        if room.parent.name == "pipeline":
            (row,) = [row for row in text.splitlines() if row.startswith(f"| `{room.name}` ")]
            files = row.split("|")[3]
            assert sorted(re.findall(r"`(\w+)`", files)) == [p.stem for p in _modules(ROOT) if p.parent == room], room
            assert ("[README]" in row) == (room / "README.md").is_file(), room
    drawing = text.split("```")[1]
    assert [p.name for p in _modules(ROOT) if p.parent.name == "pipeline" and p.name not in drawing] == []


def test_documents_link_to_what_there_is() -> None:
    for path in _documents(ROOT):
        links = re.findall(r"\]\(([^):#]+)\)", path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == [], path


def test_what_texts_name_is_there() -> None:
    """Dotted names in documents, docstrings and comments: no import fails where they outlive a move."""
    code = [path for top in ("ips", "pipeline", "tests") for path in (ROOT / top).rglob("*.py")]
    rooms = "|".join(room.name for room in _rooms(ROOT) if room.parent.name == "pipeline")
    for path in [*_documents(ROOT), *code]:
        text = path.read_text()
        names = re.findall(r"`((?:ips|pipeline|tests)(?:\.\w+)+)", text)
        names += [f"pipeline.{room}.{file}" for room, file in re.findall(rf"`({rooms})/(\w+)`", text)]
        assert [name for name in names if not _is_there(ROOT, name)] == [], path
    assert not _is_there(ROOT, "ips.heads.linear_head")
    assert not _is_there(ROOT, "ips.network.heads.dense_head")


def test_prose_of_documents_is_as_wide_as_code() -> None:
    """Tables and what is between fences cannot be wrapped."""
    for path in _documents(ROOT):
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert [line for line in prose.splitlines() if len(line) > WIDTH and not line.startswith("|")] == [], path


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
