"""Networks as TorchScript, run by torch on the CPU."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]


class ScriptedNetwork:
    """One network, on one thread: what it gives then follows from its file and the picture alone.

    Args:
        data: the file.

    Raises:
        RuntimeError: it is damaged, or of another version of torch.
    """

    def __init__(self, data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of TorchScript: what networks are given as all the same
            self._module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()  # type: ignore[no-untyped-call]

    def __call__(self, picture: Floats) -> Floats:
        """What the network makes of a picture (1, 3, h, w).

        Raises:
            TypeError: it gives something else than one tensor.
            RuntimeError: it cannot be run on such a picture.
        """
        # not optimised by what it was called with before, so that the first call and the third give the same bits
        unoptimised = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode(), unoptimised:
                found = self._module(torch.from_numpy(picture))
        finally:
            torch.set_num_threads(threads)  # of the process, which may learn afterwards
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"it gives a {type(found).__name__}, not one tensor")
        return np.asarray(found.float().numpy(), np.float32)
