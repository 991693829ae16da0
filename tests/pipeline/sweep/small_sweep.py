"""A tiny sweep: plain images of two sites, and networks with weights of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.recipe import Config
from pipeline.model.build import build_model
from pipeline.model.folder import save_model
from tests.pipeline.small import small_config, write_slide

SLIDES = 13
"""Of 7 patients; the last slide is no slide."""


def write_model(folder: Path, seed: int, **changes: object) -> Path:
    """Random weights."""
    config = small_config(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    save_model(folder, build_model(config).state_dict(), config)
    return folder


def write_cohort(folder: Path, name: str = "cohort", slides: int = SLIDES) -> Path:
    """Labels and sites in turns; two slides a patient."""
    lines = ["slide_id,uri,patient_id,label,site"]
    for number in range(slides):
        path = folder / f"s{number}.png"
        if number == SLIDES - 1:
            path.write_bytes(b"no slide")
        elif not path.exists():
            write_slide(path, number)
        lines.append(f"s{number},s{number}.png,p{number // 2},{'yes' if number % 3 else 'no'},{'ab'[number % 2]}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.csv"


def sweep_config(folder: Path, tracking_uri: str, models: dict[str, str], **sweep: Any) -> Config:
    """Of a sweep below the folder, in this process, without heatmaps unless asked for."""
    cohorts = sweep.pop("cohorts", {"all": str(folder / "cohort.csv")})
    root = folder / "root"
    return small_config(
        name=f"sweep-{folder.name}",
        cohort={"uri": str(folder / "cohort.csv")},
        storage={"root": str(root), "patches": str(root / "patches"), "features": str(root / "features")},
        tracking={"uri": tracking_uri, "experiment": f"sweep-{folder.name}", "model": "small"},
        sweep={"models": models, "cohorts": cohorts, "resamples": 200, "overlays": 0, "workers": 0, "few": 3, **sweep},
    )
