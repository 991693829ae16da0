from __future__ import annotations

import re
from pathlib import Path

import torch

_README = Path(__file__).resolve().parents[2] / "ips" / "README.md"


def test_the_example_runs_as_printed() -> None:
    code, _ = re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    attention, loss = names["attention"], names["loss"]
    assert isinstance(attention, tuple)
    assert [len(weights) for weights in attention] == [90, 23]
    assert isinstance(loss, torch.Tensor)
    assert loss.isfinite()


def test_every_file_is_listed() -> None:
    files = {path.name for path in _README.parent.rglob("*.py") if path.name != "__init__.py"}
    assert files <= set(re.findall(r"`(\w+\.py)`", _README.read_text()))
