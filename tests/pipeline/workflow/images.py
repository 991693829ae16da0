"""A cohort of plain images that a test changes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from tests.synth import tissue_rgb


def image_config(folder: Path, *overrides: str) -> Config:
    places = [f"cohort.uri={folder / 'cohort.csv'}", f"storage.root={folder / 'root'}"]
    return load_config("default", [*places, "tiling=image", "tiling.patch_px=64", *overrides])


def write_images(folder: Path, patients: Mapping[str, str]) -> None:
    """Slide id -> patient; ids that start with `bad` are no images."""
    for name in patients:
        path = folder / f"{name}.png"
        if name.startswith("bad"):
            path.write_bytes(b"not an image")
        elif not path.exists():
            Image.fromarray(tissue_rgb(211, 157, seed=sum(name.encode()))).save(path)
    lines = [f"{name},{name}.png,{patient},{number % 2}" for number, (name, patient) in enumerate(patients.items())]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,patient_id,label", *lines]) + "\n")
