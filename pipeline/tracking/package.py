"""A trained folder as a pyfunc model from code, complete in itself.

It holds `serving.py`, the weights as safetensors (of a model on features, also those of the network that makes them),
the network that finds the tissue where there is one, the config, and the packages `ips` and `pipeline` as they are, so
that a serving host needs the listed requirements and nothing of this repository, nor of where the model was trained.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from importlib.metadata import version as installed
from pathlib import Path

import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pipeline.config.recipe import Config
from pipeline.model.calibration import CALIBRATION, end_columns
from pipeline.model.folder import CONFIG, EMBED_WEIGHTS, MEMBERS, SEEN, TISSUE_NETWORK, WEIGHTS
from pipeline.segmentation.network import read_network
from pipeline.storage import files

_PACKAGES = Path(__file__).resolve().parents[2]
REQUIREMENTS = (  # what `serving.py` imports, directly or not
    "fsspec", "imagecodecs", "mlflow", "numpy", "openslide-bin", "openslide-python", "pandas", "pillow",
    "psutil", "pyarrow", "pydantic", "rich", "s3fs", "safetensors", "scipy", "simplejpeg", "tifffile", "torch",
)  # fmt: skip
_EXAMPLE_MPP = 0.25  # microns per px of a 40x scan


def gather_artifacts(folder: Path, config: Config, scratch: Path) -> dict[str, str]:
    """The model's files; with the weights of what makes its features, and the network that finds its tissue.

    Both are copied to where they have one name: they lie at paths of where the model was trained, which a serving host
    need not reach.

    Raises:
        ConfigError: as `read_network`.
        StorageError: one of them cannot be read.
    """
    artifacts = {"weights": str(folder / WEIGHTS), "config": str(folder / CONFIG)}
    beside = {"seen": folder / SEEN, "calibration": folder / CALIBRATION}
    artifacts |= {name: str(path) for name, path in beside.items() if path.is_file()}
    if config.model.encoder.name == "features" and config.embed is not None and config.embed.encoder.weights:
        files.download(config.embed.encoder.weights, scratch / EMBED_WEIGHTS)
        artifacts["embed_weights"] = str(scratch / EMBED_WEIGHTS)
    if config.tiling.tissue_model is not None:
        (scratch / TISSUE_NETWORK).write_bytes(read_network(config.tiling.tissue_model)[1])
        artifacts["tissue_network"] = str(scratch / TISSUE_NETWORK)
    return artifacts


def gather_members(folders: Sequence[Path], config: Config, scratch: Path) -> dict[str, str]:
    """As `gather_artifacts`, of an ensemble: a folder for each model, and once what all take beside their weights."""
    place = scratch / MEMBERS
    for number, folder in enumerate(folders):
        member = place / f"{number:02d}"
        member.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG, SEEN):
            if (folder / name).is_file():
                shutil.copy(folder / name, member / name)
    gather_artifacts(folders[0], config, place)
    return {MEMBERS: str(place)}


def write_package(target: Path, artifacts: dict[str, str], config: Config, example_uri: str, model: Model) -> None:
    """Write the model to `target`, which is made; `artifacts` are those that `gather_artifacts` names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*inferred as AnyType")  # MLflow's of its own code, at this import
        from mlflow.pyfunc import save_model

    save_model(
        target,
        python_model=_PACKAGES / "pipeline" / "results" / "serving.py",
        artifacts=artifacts,
        code_paths=[str(_PACKAGES / "ips"), str(_PACKAGES / "pipeline")],
        signature=_signature(config),
        input_example=pd.DataFrame({"uri": [example_uri], "mpp": [_EXAMPLE_MPP]}),
        pip_requirements=requirements(config),
        mlflow_model=model,
    )


def requirements(config: Config) -> list[str]:
    """What a host has to install for this model.

    Raises:
        ConfigError, StorageError: as `read_network`, of a model whose tiling has one.
    """
    encoder = config.model.encoder
    if encoder.name == "features" and config.embed is not None:
        encoder = config.embed.encoder
    names = [*REQUIREMENTS, *(["timm"] if encoder.name.startswith("timm:") else [])]
    names += ["h5py"] if config.given_features else []
    network = config.tiling.tissue_model
    names += ["onnxruntime"] if network is not None and read_network(network)[0] == "onnx" else []
    return [f"{name}=={_public(installed(name))}" for name in names]


def _signature(config: Config) -> ModelSignature:
    outputs = [column for task in config.tasks for column in task.output_columns]
    ends = [name for pair in end_columns(config.tasks).values() for name in pair]
    return ModelSignature(
        Schema(
            [
                ColSpec(DataType.string, "uri"),
                ColSpec(DataType.double, "mpp", required=False),
                ColSpec(DataType.double, "series", required=False),  # whole numbers, of which some may be missing
                *(ColSpec(DataType.string, name, required=False) for name in config.cohort.grouping),
            ]
        ),
        Schema(
            [
                ColSpec(DataType.string, "uri"),
                *(ColSpec(DataType.double, name, required=False) for name in (*outputs, *ends)),
                ColSpec(DataType.double, "patch", required=False),
                *(ColSpec(AnyType(), name, required=False) for name in ("patches", "top", "curves")),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        ParamSchema(
            [
                ParamSpec("attention", DataType.boolean, default=False),
                ParamSpec("top_k", DataType.long, default=0),
                ParamSpec("explain", DataType.boolean, default=False),
                ParamSpec("intervals", DataType.boolean, default=False),
            ]
        ),
    )


def _public(version: str) -> str:
    """A version without its local part (2.13.0+cpu): an index has only the public ones."""
    return version.partition("+")[0]
