"""MNIST as its authors publish it: four idx files in a folder, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import StorageError
from pipeline.storage.files import exists, join, read_bytes

Subset = Literal["train", "test"]
DIGIT_PX = 28
_FILES: Mapping[Subset, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Digits:
    """MNIST: n digits."""

    images: npt.NDArray[np.uint8]
    """(n, 28, 28)."""
    labels: npt.NDArray[np.int64]
    """(n,) 0..9."""
    sha256: str
    """Of the pixels and the labels."""


@lru_cache(maxsize=2)  # the training digits take 47 MB
def read_digits(folder: str, subset: Subset) -> Digits:
    """Read MNIST idx files (http://yann.lecun.com/exdb/mnist) from a folder, gzipped or not.

    Raises:
        StorageError: a file is absent, or is not what its name says.
    """
    images, labels = (_read_idx(folder, name) for name in _FILES[subset])
    if images.ndim != 3 or images.shape[1:] != (DIGIT_PX, DIGIT_PX) or labels.shape != images.shape[:1]:
        raise StorageError(
            f"{folder}: the {subset} images are {images.shape} and the labels {labels.shape}; MNIST has "
            f"(n, {DIGIT_PX}, {DIGIT_PX}) and (n,)"
        )
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return Digits(images, labels.astype(np.int64), digest)


def idx_files(folder: str, subset: Subset) -> list[str]:
    """URIs of the two files of a subset, as they are there.

    Raises:
        StorageError: one is absent.
    """
    return [_find(folder, name) for name in _FILES[subset]]


def _find(folder: str, name: str) -> str:
    for candidate in (join(folder, f"{name}.gz"), join(folder, name)):
        if exists(candidate):
            return candidate
    raise StorageError(f"{folder}: neither {name}.gz nor {name} is there; name a folder with the four MNIST files")


def _read_idx(folder: str, name: str) -> npt.NDArray[np.uint8]:
    """An idx file: two zero bytes, 8 for uint8, the number of axes, their sizes as big-endian int32, the bytes."""
    uri = _find(folder, name)
    data = read_bytes(uri)
    try:
        data = gzip.decompress(data) if uri.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"{uri}: not a whole gzip file ({error}); fetch it again") from error
    axes = data[3] if data[:3] == b"\x00\x00\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * axes], ">i4").tolist())
    if not axes or len(shape) != axes or len(data) != 4 + 4 * axes + math.prod(shape):
        raise StorageError(f"{uri}: not an idx file of bytes, or cut short ({len(data)} bytes); fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
