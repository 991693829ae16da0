from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ips.network.tensors import read_tensors


class Evil:
    """Would run a command where its file is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def _saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    return io.BytesIO(file.getvalue())


def test_tensors_numbers_and_texts_come_back() -> None:
    value = {"a": torch.arange(3), "b": [1, 2.5, "c"], "d": {"e": None}}
    found = read_tensors(_saved(value))
    assert torch.equal(found.pop("a"), torch.arange(3))
    assert found == {"b": [1, 2.5, "c"], "d": {"e": None}}


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    for file in (_saved(evil), io.BytesIO(pickle.dumps(evil, 2))):
        with pytest.raises(ValueError, match=r"^it holds posix\.system, which is no tensor and was not run$"):
            read_tensors(file)
    with pytest.raises(
        ValueError, match=r"^it holds torch\.nn\.modules\.linear\.Linear, which is no tensor and was not run"
    ):
        read_tensors(_saved(nn.Linear(2, 3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"junk junk junk", b"PK\x03\x04abc", b"<html>404</html>"])
def test_what_is_damaged_is_said_without_advice_to_run_it(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is damaged, or was not written by torch\.save$"):
        read_tensors(io.BytesIO(data))
