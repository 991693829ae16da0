"""A folder of idx files like MNIST's, of few made-up digits: what the generator reads, in milliseconds."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

COUNTS = {"train": 60, "t10k": 40}


def idx_bytes(array: np.ndarray) -> bytes:
    """An idx file of uint8."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def write_digits(folder: Path) -> Path:
    """Every class several times; a digit is a bright square whose place and size tell its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in COUNTS.items():
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 + 2 * label : 8 + 2 * label, 3 : 8 + 2 * label] = 131 + 12 * label
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))  # not gzipped: both kinds are read
    return folder
