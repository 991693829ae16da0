"""Checks of everything a run needs, each with what was found and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import PipelineError
from pipeline.storage.files import delete, is_remote, join, read_bytes, write_bytes
from pipeline.tracking.tracker import connect, open_tracking

_MIN_FREE_BYTES = 5 * 10**9  # a demo run writes about 1 GB, and Ray spills when a disk is 95% full


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(name: str, overrides: Sequence[str], config_dir: Path | None) -> list[Check]:
    """All checks for one config; they write and delete a file in storage.root and, without a server, make mlflow.db."""
    checks = [_python(), _torch(), _ray(), _openslide(), _codec(), _disk(Path.cwd())]
    try:
        given = ["cohort.uri=cohort.csv"] if name == "default" else []  # the default config names no cohort
        config = load_config(name, [*given, *overrides], config_dir)
    except PipelineError as error:
        return [*checks, Check("config", ok=False, found=str(error), remedy="mend the fields named")]
    checks.append(Check("config", ok=True, found=name))
    return [
        *checks,
        _devices(config),
        _guarded("storage", lambda: _storage(config)),
        _guarded("mlflow", lambda: _mlflow(config)),
    ]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check, or the product's own error as a finding; its message holds the remedy."""
    try:
        return check()
    except PipelineError as error:
        return Check(name, ok=False, found=str(error), remedy="as the message says")


def _python() -> Check:
    found = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("python", ok, found, "" if ok else "use Python 3.11 or 3.12")


def _torch() -> Check:
    import torch

    found = (
        f"torch {torch.__version__}, {'CUDA ' + str(torch.version.cuda) if torch.cuda.is_available() else 'CPU only'}"
    )
    wanted = (2, 11) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) <= (2, 13)
    return Check("torch", wanted, found, "" if wanted else "pip install 'torch>=2.11,<2.14'")


def _ray() -> Check:
    found = version("ray")
    ok = found.startswith("2.60.")
    return Check("ray", ok, f"ray {found}", "" if ok else "pip install 'ray[data,train,default]==2.60.*'")


def _openslide() -> Check:
    from pipeline.slides.open import tool_versions

    found = tool_versions()["openslide"]
    ok = tuple(int(part) for part in found.split(".")[:3]) >= (4, 0, 1)
    remedy = "" if ok else "pip install 'openslide-bin>=4.0.1': earlier ones write out of bounds on crafted files"
    return Check("openslide", ok, f"OpenSlide {found}", remedy)


def _codec() -> Check:
    import numpy as np
    import simplejpeg

    patch = np.full((16, 16, 3), 127, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(patch, quality=90, colorsubsampling="444"))
    return Check("jpeg", bool(abs(decoded.astype(int) - 127).max() <= 1), f"simplejpeg {version('simplejpeg')}")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= _MIN_FREE_BYTES
    remedy = "" if ok else f"free at least {_MIN_FREE_BYTES / 1e9:g} GB, or run elsewhere"
    return Check("disk", ok, f"{free / 1e9:.0f} GB free at {folder}", remedy)


def _devices(config: Config) -> Check:
    import torch

    wanted, has = config.cluster.gpus_per_worker, torch.cuda.device_count()
    local = config.cluster.address is None and "RAY_ADDRESS" not in os.environ
    ok = not local or has >= wanted * config.cluster.fewest_workers
    remedy = "" if ok else "set cluster.gpus_per_worker=0 or cluster=local, or run where the GPUs are"
    return Check("devices", ok, f"{has} GPUs here, {wanted:g} a worker asked for", remedy)


def _storage(config: Config) -> Check:
    root = config.storage.root
    probe = join(root, ".doctor")
    write_bytes(probe, b"ok")
    ok = read_bytes(probe) == b"ok"
    delete(probe)
    place = "object storage" if is_remote(root) else "local files"
    return Check("storage", ok, f"{root} ({place}) is readable and writable")


def _mlflow(config: Config) -> Check:
    tracking = config.tracking
    assert tracking.uri is not None  # compose.py fills both
    assert tracking.experiment is not None
    if tracking.uri.startswith("http"):
        connect(tracking.uri)  # only looks: an experiment made here would keep this place for its artifacts
    else:
        open_tracking(tracking.uri, tracking.experiment, join(config.storage.root, "artifacts"))
    return Check("mlflow", ok=True, found=f"mlflow {version('mlflow')} at {tracking.uri}")
