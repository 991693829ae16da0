"""Files of `torch.save`, read so that nothing in them is run."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

import torch

_OTHERS = re.compile(r"GLOBAL ([\w.]+)")  # what torch calls a class or function that it would have to run


def read_tensors(file: BinaryIO) -> Any:
    """The tensors, numbers and texts of a file, in the containers that they were saved in.

    Raises:
        ValueError: it holds anything else, or is damaged. torch's own text advises to run what is in it.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        other = _OTHERS.search(str(error))
        if other is not None:
            raise ValueError(f"it holds {other[1]}, which is no tensor and was not run") from error
        raise ValueError("it is damaged, or was not written by torch.save") from error
