"""Networks as ONNX, run by onnxruntime on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime

Floats = npt.NDArray[np.float32]


class OnnxNetwork:
    """One network, on one thread: what it gives then follows from its file and the picture alone.

    Args:
        data: the file; weights in files beside it cannot be read.

    Raises:
        ValueError: it is no such network, or has several inputs or outputs.
    """

    def __init__(self, data: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # what is said by warnings is of its own optimisations
        try:
            self._session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise ValueError(str(error).strip()) from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(f"it has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")
        self._input = inputs[0].name

    def __call__(self, picture: Floats) -> Floats:
        """What the network makes of a picture (1, 3, h, w).

        Raises:
            ValueError: it cannot be run on such a picture.
        """
        try:
            (found,) = self._session.run(None, {self._input: picture})
        except Exception as error:  # as above
            raise ValueError(str(error).strip()) from error
        return np.asarray(found, np.float32)
