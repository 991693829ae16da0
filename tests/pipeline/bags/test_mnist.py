from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from pipeline.bags.mnist import idx_files, read_digits
from pipeline.errors import StorageError
from tests.pipeline.digits import COUNTS, idx_bytes, write_digits


def test_gzipped_and_plain_files_are_read(tmp_path: Path) -> None:
    folder = str(write_digits(tmp_path))
    train, test = read_digits(folder, "train"), read_digits(folder, "test")
    assert train.images.shape == (COUNTS["train"], 28, 28)
    assert train.images[7, 16, 3] == 131 + 12 * 7
    assert train.labels.tolist() == [n % 10 for n in range(COUNTS["train"])]
    assert test.images.shape == (COUNTS["t10k"], 28, 28)
    assert train.sha256 != test.sha256
    assert [Path(uri).name for uri in idx_files(folder, "test")] == [
        "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte",
    ]  # fmt: skip


def _broken(folder: Path, name: str, data: bytes) -> str:
    (write_digits(folder) / name).write_bytes(data)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(59)), r"images are \(60, 28, 28\) and the labels \(59,\)"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(60))[:-1], "cut short"),
        ("train-labels-idx1-ubyte", b"PNG", "not an idx file"),
        ("train-labels-idx1-ubyte", b"", "not an idx file"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8bnothing", "not a whole gzip file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"12345678" * 99, mtime=0)[:-12], "not a whole gzip file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx_bytes(np.zeros((60, 20, 28))), mtime=0), r"\(60, 20, 28\)"),
    ],
)
def test_what_is_no_mnist_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        read_digits(_broken(tmp_path, name, data), "train")
    assert str(tmp_path) in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="neither t10k-images-idx3-ubyte.gz nor t10k-images-idx3-ubyte is there"):
        read_digits(str(tmp_path), "test")
