"""A tissue network's file: which kind it is, whether it is the one that was meant, and what it says of a picture."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from pipeline.config.tissue import TissueModelConfig
from pipeline.errors import ConfigError
from pipeline.storage import files

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Run = Callable[[Floats], Floats]
"""What a network makes of a picture (1, 3, h, w): (1, C, h, w)."""

FIELD = "tiling.tissue_model"
_EXPORT = (
    "export it as TorchScript (torch.jit.trace(network.eval(), torch.zeros(1, 3, 512, 512)).save(FILE)) or as ONNX "
    "(torch.onnx.export)"
)


def read_network(settings: TissueModelConfig) -> tuple[str, bytes]:
    """The kind of the file, torchscript or onnx, and its bytes; nothing of it is executed.

    Raises:
        ConfigError: it is another file than the one that `sha256` names, none of these kinds, or onnxruntime is not
            installed.
        StorageError: it cannot be read.
    """
    data = files.read_bytes(settings.uri)
    digest = hashlib.sha256(data).hexdigest()
    if digest != settings.sha256:
        problem = f"{settings.uri} has {digest}: it is another file, or was changed; give this where it is right"
        raise _bad("sha256", problem)
    kind = _kind(data, settings.uri)
    if kind == "onnx" and find_spec("onnxruntime") is None:
        raise _bad("uri", f'{settings.uri}: ONNX needs onnxruntime; pip install "ips-pipeline[onnx]"')
    return kind, data


@lru_cache(maxsize=1)  # a process has one config; loading takes a second
def open_network(settings: TissueModelConfig) -> Run:
    """The network, loaded and tried on glass.

    Raises:
        ConfigError: as `read_network`; it cannot be loaded or run, or gives something else than a value for each class
            and px.
        StorageError: it cannot be read.
    """
    kind, data = read_network(settings)
    try:
        run = _loaded(kind, data)
        shape = run(np.ones((1, 3, settings.tile, settings.tile), np.float32)).shape
    except (RuntimeError, TypeError, ValueError) as error:
        told = (str(error).strip().splitlines() or [repr(error)])[-1]
        raise _bad("uri", f"{settings.uri} cannot be run on {settings.tile} x {settings.tile} px: {told}") from error
    check_shape(shape, settings)
    return run


def check_shape(shape: tuple[int, ...], settings: TissueModelConfig) -> None:
    """ConfigError where a network's output for a tile has another shape than (1, classes, tile, tile)."""
    edge, classes = settings.tile, len(settings.classes)
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (edge, edge):
        raise _bad(
            "uri",
            f"{settings.uri} makes {list(shape)} of {[1, 3, edge, edge]}; it must give each px of the picture a value "
            "for each class: scale its output up to its input's size before it is exported",
        )
    if shape[1] != classes:
        problem = f"{settings.uri} has {shape[1]} output channels and {classes} classes are named; name each, in order"
        raise _bad("classes", problem)


def is_tissue(output: Floats, settings: TissueModelConfig) -> Mask:
    """(h, w) px of an output (C, h, w) whose class is one of `tissue`; of equal values the first class counts."""
    if settings.threshold is None and len(settings.classes) > 1:
        return np.isin(output.argmax(axis=0), _places(settings))
    shares = output.astype(np.float64)
    if settings.outputs == "logits" and len(shares) == 1:
        shares = 1 / (1 + np.exp(-np.clip(shares, -500, 500)))
    elif settings.outputs == "logits":
        shares = np.exp(shares - shares.max(axis=0))
        shares /= shares.sum(axis=0)
    limit = 0.5 if settings.threshold is None else settings.threshold
    return np.asarray(shares[_places(settings)].sum(axis=0) >= limit)


def _places(settings: TissueModelConfig) -> list[int]:
    return [settings.classes.index(name) for name in settings.tissue]


def _loaded(kind: str, data: bytes) -> Run:
    if kind == "onnx":
        from pipeline.segmentation.onnx import OnnxNetwork

        return OnnxNetwork(data)
    from pipeline.segmentation.torchscript import ScriptedNetwork  # loads torch, which no other tiling needs

    return ScriptedNetwork(data)


def _kind(data: bytes, uri: str) -> str:
    """By the content; ConfigError of what is neither, before anything of it is taken for code."""
    if data[:4] == b"PK\x03\x04":
        try:
            names = [name.partition("/")[2] for name in zipfile.ZipFile(io.BytesIO(data)).namelist()]
        except zipfile.BadZipFile as error:
            raise _bad("uri", f"{uri}: the file is cut short or damaged ({error}); copy it again") from error
        if "constants.pkl" in names and any(name.startswith("code/") for name in names):
            return "torchscript"
        if "data.pkl" in names:
            raise _bad("uri", f"{uri}: weights or objects as torch.save writes them, without the network; {_EXPORT}")
        raise _bad("uri", f"{uri}: a ZIP archive that holds no TorchScript; {_EXPORT}")
    if data[:1] == b"\x80":
        raise _bad("uri", f"{uri}: a pickle, whose loading may run any code, so it is not loaded; {_EXPORT}")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        raise _bad("uri", f"{uri}: safetensors hold weights without the network that they are of; {_EXPORT}")
    if data[:1] == b"\x08":  # field 1 of an ONNX model, its version
        return "onnx"
    raise _bad("uri", f"{uri}: neither TorchScript nor ONNX; {_EXPORT}")


def _bad(field: str, problem: str) -> ConfigError:
    return ConfigError("config", [f"{FIELD}.{field}: {problem}"])
