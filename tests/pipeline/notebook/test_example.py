"""The example notebook in Jupyter's own kernel, where an event loop is running, and as a page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

EXAMPLE = Path(__file__).with_name("example.py")
BEFORE = """import asyncio, logging, signal
asyncio.get_running_loop()
def _state():
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    return logging.root.handlers[:], logging.root.level, logging.getLogger("pipeline").level, handlers

_before = _state()
"""
AFTER = """asyncio.get_running_loop()
assert _before == _state(), (_before, _state())
try:
    predict("models:/nobody@champion", "a.tif")
except Exception as error:
    print(type(error).__name__, error)
"""


def notebook() -> Any:
    """The script's cells."""
    cells = []
    for kind, text in re.findall(
        r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", EXAMPLE.read_text(), re.DOTALL | re.MULTILINE
    ):
        text = text.strip()
        if kind:
            cells.append(nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", text, flags=re.MULTILINE)))
        else:
            cells.append(nbformat.v4.new_code_cell(text))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_example_runs_in_jupyter_and_shows_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = notebook()
    shown = len(book.cells)
    book.cells = [nbformat.v4.new_code_cell(BEFORE), *book.cells, nbformat.v4.new_code_cell(AFTER)]
    (tmp_path / "work").mkdir()
    ExecutePreprocessor(timeout=500, kernel_name="python3").preprocess(book, {"metadata": {"path": tmp_path / "work"}})
    outputs = [[*cell.get("outputs", [])] for cell in book.cells]
    said = "".join(output.get("text", "") for cell in outputs for output in cell)
    assert "TrackingError" in said.splitlines()[-1]
    assert not [output for cell in outputs[:-1] for output in cell if output.output_type == "error"]
    html = [output.data.get("text/html", "") for cell in outputs for output in cell if "data" in output]
    for expected in (
        "24 slides, ",
        "24 patches of",
        "patches of 1 slides",
        "<td>register</td><td>done</td>",
        "<iframe srcdoc",
        "2 slides by",
    ):
        assert any(expected in text for text in html), expected
    assert "image/png" in outputs[-2][-1].data
    book.cells = book.cells[1 : shown + 1]
    page, _ = HTMLExporter().from_notebook_node(book)
    target = Path(os.environ.get("IPS_NOTEBOOK_PAGE", tmp_path / "example.html"))
    target.write_text(page)
    assert page.count("data:image/png;base64,") >= 4
