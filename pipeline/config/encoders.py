"""Pathology encoders by name: what each is made of, how its pixels are prepared, what it gives, and whose it is.

The weights are had from whoever made them, after accepting their licence; nothing is downloaded unasked. All are vision
transformers (`ips.network.transformer`). The source of a row's numbers is the model's card, as its authors' and
TRIDENT's loading code state it (TRIDENT 0.3, `patch_encoder_models/load.py` and its README's table); parameters are
those published, which a test compares with those of the network built. Those of conch15 (CONCH v1.5, the vision tower
alone) are counted of its published configuration.

Left out: CTransPath, a Swin transformer (27.5 M parameters, GPL-3.0) whose windows, shifts and stem would be half a
file of their own for one network of 2022: bring its features instead (`cohort.features`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.data import TilingConfig

Floats = tuple[float, ...]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BIOPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)


@dataclass(frozen=True)
class Preset:
    """One encoder."""

    architecture: Mapping[str, Any]
    """Arguments of `ips.network.transformer.Architecture`."""
    width: int
    """D of its features."""
    parameters: str
    """As published, in millions."""
    repository: str
    """On huggingface.co, whose card states the terms."""
    file: str
    """Of the weights there."""
    licence: str
    patch_px: int = 224
    """Edge of the patches that it is given, px; other sizes are resized to `architecture["image"]`."""
    mpp: float = 0.5
    """Microns per px that it is recommended for: 20x."""
    statistics: tuple[Floats, Floats] = _IMAGENET
    """Mean and standard deviation of pixels scaled to 0..1."""
    naming: Literal["timm", "transformers", "conch"] = "timm"
    """Whose names its file of weights has."""


def _vit(patch: int, dim: int, depth: int, heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    return {"image": 224, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "hidden": hidden, **more}


_LARGE = _vit(16, 1024, 24, 16, 4096)
_GIANT = _vit(14, 1536, 40, 24, 8192, gated=True, registers=4, places_all=False)
_HUGE = _vit(14, 1280, 32, 16, 6832, gated=True, pool="class+mean")

PRESETS: Mapping[str, Preset] = {
    "uni": Preset(_LARGE, 1024, "303", "MahmoodLab/UNI", "pytorch_model.bin", "CC-BY-NC-ND-4.0", patch_px=256),
    "uni2": Preset(
        _vit(14, 1536, 24, 24, 8192, gated=True, registers=8, places_all=False),
        1536,
        "681",
        "MahmoodLab/UNI2-h",
        "pytorch_model.bin",
        "CC-BY-NC-ND-4.0",
        patch_px=256,
    ),
    "conch15": Preset(
        {**_LARGE, "image": 448, "placed": 224, "pool": "attention", "pooled": 768},
        768,
        "306",
        "MahmoodLab/TITAN",
        "conch_v1_5_pytorch_model.bin",
        "CC-BY-NC-ND-4.0",
        patch_px=512,
        naming="conch",
    ),
    "virchow": Preset(_HUGE, 2560, "631", "paige-ai/Virchow", "pytorch_model.bin", "Apache-2.0"),
    "virchow2": Preset(
        {**_HUGE, "registers": 4}, 2560, "631", "paige-ai/Virchow2", "pytorch_model.bin", "CC-BY-NC-ND-4.0"
    ),
    "gigapath": Preset(
        _vit(16, 1536, 40, 24, 8192, gated=True),
        1536,
        "1135",
        "prov-gigapath/prov-gigapath",
        "pytorch_model.bin",
        "Apache-2.0, for research use",
    ),
    "h-optimus-0": Preset(
        _GIANT, 1536, "1135", "bioptimus/H-optimus-0", "pytorch_model.bin", "Apache-2.0", statistics=_BIOPTIMUS
    ),
    "h-optimus-1": Preset(
        _GIANT,
        1536,
        "1135",
        "bioptimus/H-optimus-1",
        "pytorch_model.bin",
        "as its card states",
        statistics=_BIOPTIMUS,
    ),
    "phikon-v2": Preset(
        _LARGE,
        1024,
        "303",
        "owkin/phikon-v2",
        "model.safetensors",
        "Owkin non-commercial licence",
        naming="transformers",
    ),
}


def with_statistics(data: Any) -> Any:
    """A section's values as given, with the mean and std of its encoder's preset where none are given."""
    if not isinstance(data, Mapping):
        return data
    encoder = data.get("encoder")
    name = encoder.get("name") if isinstance(encoder, Mapping) else getattr(encoder, "name", None)
    preset = PRESETS.get(str(name))
    return data if preset is None else {"mean": preset.statistics[0], "std": preset.statistics[1], **data}


def with_tiling(data: Any, name: object) -> Any:
    """Values of the tiling as given, with the patches that a preset takes where none are said."""
    preset = PRESETS.get(str(name))
    if preset is None or not isinstance(data, Mapping | None):
        return data
    return {"patch_px": preset.patch_px, "mpp": preset.mpp, **(data or {})}


def differing(field: str, name: str, statistics: tuple[Floats, Floats], tiling: TilingConfig) -> list[str]:
    """In what a config departs from the preset of an encoder, in words.

    Args:
        field: the encoder's section.
        name: of the encoder.
        statistics: mean and std.
        tiling: of the config.
    """
    preset = PRESETS.get(name)
    if preset is None:
        return []
    found = []
    if tiling.patch_px != preset.patch_px:
        edge = preset.architecture["image"]
        found.append(f"tiling.patch_px={tiling.patch_px}, and it takes {preset.patch_px} (resized to {edge})")
    if tiling.mpp is None or abs(tiling.mpp / preset.mpp - 1) > tiling.mpp_tolerance:
        found.append(f"tiling.mpp={tiling.mpp}, and it is recommended for {preset.mpp}")
    if statistics != preset.statistics:
        mean, std = statistics
        found.append(f"mean={list(mean)} and std={list(std)}, and it takes {list(map(list, preset.statistics))}")
    return [f"{field}.encoder.name={name}: {one}" for one in found]
