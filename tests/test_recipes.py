"""The shipped recipes: each loads and plans; the photographs' one trains end to end on generated scenes."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.workflow.run import load_cohort, plan, run

CONF = Path(__file__).resolve().parents[1] / "conf"
LIMITS = ("empty", "50", "70", "80")
NEEDED = {
    "camelyon16": ["embed.encoder.weights=absent.safetensors"],
    "megapixel_mnist": ["cohort.megapixel_mnist.folder=absent"],
}


def _recipe(name: str, folder: Path, *overrides: str) -> Config:
    """A shipped recipe whose cohort and results lie in a folder."""
    places = [f"cohort.uri={folder / 'cohort.csv'}", f"storage.root={folder / 'root'}"]
    return load_config(name, [*NEEDED.get(name, []), *places, *overrides], CONF)


def _scene(path: Path, seed: int, limit: str) -> None:
    """A photograph of 1280 x 960 px: sky, road, noise, and a speed limit somewhere above the horizon, or none."""
    chance = np.random.default_rng(seed)
    ground = np.linspace((150, 180, 210), (90, 95, 90), 960)[:, None] + chance.normal(0, 12, (960, 1280, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    if limit != "empty":
        draw, x, y = ImageDraw.Draw(image), int(chance.integers(40, 1240)), int(chance.integers(40, 500))
        draw.ellipse((x - 26, y - 26, x + 26, y + 26), fill="gold", outline="red", width=8)
        draw.text((x, y), limit, fill="black", anchor="mm", font_size=24)
    image.save(path, quality=92)


def _photographs(folder: Path, count: int) -> None:
    """A cohort of scenes of every class, in all three splits."""
    lines = ["slide_id,uri,split,label"]
    for number in range(count):
        limit, split = LIMITS[number % 4], ("train", "train", "val", "test")[number // 4 % 4]
        _scene(folder / f"scene {number}.jpg", number, limit)
        lines.append(f"{number},scene {number}.jpg,{split},{limit}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")


def _tissue(folder: Path) -> None:
    """A cohort whose slides nobody reads while it is only planned."""
    rows = []
    for number, split in enumerate(("train", "train", "val", "val", "test", "test")):
        (folder / f"{number}.tif").write_bytes(b"")
        rows.append(f"{number},{number}.tif,{split},{number % 2},{number % 2}")
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,split,label,burden", *rows]) + "\n")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_recipe_plans(name: str, tmp_path: Path) -> None:
    generated = name in ("demo", "megapixel_mnist")
    if name == "traffic_signs":
        _photographs(tmp_path, 16)
    elif not generated:
        _tissue(tmp_path)
    first, *later = plan(_recipe(name, tmp_path))
    assert (first.stage, first.action) == (name if generated else "tile", "run")
    assert {stage.action for stage in later} == {"unknown"}
    assert not (tmp_path / "root").exists()


def test_the_papers_settings() -> None:
    place = Path("nowhere")
    signs, camelyon, digits = (_recipe(name, place) for name in ("traffic_signs", "camelyon16", "megapixel_mnist"))
    for config, memory, chunk, lr, epochs in (
        (signs, 10, 32, 3e-4, 150),
        (camelyon, 5000, 5000, 3e-4, 50),
        (digits, 100, 100, 1e-3, 150),
    ):
        assert (config.model.select.memory, config.model.select.chunk) == (memory, chunk)
        train = config.train
        assert (train.batch_size, train.lr, train.epochs, train.warmup_epochs) == (16, lr, epochs, 10)
        assert (train.weight_decay, train.clip_norm, train.augment) == (0.1, None, False)
        pool = config.model.aggregator
        assert (pool.heads, pool.key_dim, pool.hidden_dim) == ((8, 16, 512) if config is digits else (8, 64, 2048))


def test_camelyon16_lists_the_challenges_slides_as_a_public_bucket_holds_them() -> None:
    listed = CONF / "cohort" / "camelyon16.csv"
    rows = list(csv.DictReader(listed.read_text().splitlines()))
    assert Counter((row["split"] == "test", row["label"]) for row in rows) == {
        (False, "0"): 159,
        (False, "1"): 111,
        (True, "0"): 80,
        (True, "1"): 49,
    }
    assert rows[0]["uri"] == "s3://anonymous@camelyon-dataset/CAMELYON16/images/normal_001.tif"
    config = load_config("camelyon16", [*NEEDED["camelyon16"]], CONF)
    cohort = load_cohort(config, needs_labels=True)
    assert len(cohort.slides) == 399
    assert all(slide.uri.startswith("s3://anonymous@camelyon-dataset/") for slide in cohort.slides)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.ray
def test_traffic_signs_train_end_to_end_on_generated_scenes(ray_session: None, tmp_path: Path) -> None:
    _photographs(tmp_path, 16)
    small = ["model.encoder.stages=2", "train.epochs=1", "train.warmup_epochs=1", "train.batch_size=4"]
    result = run(_recipe("traffic_signs", tmp_path, *small, "evaluate.bootstrap=20"), "evaluate")
    stages = result.stages
    assert stages["tile"].record.metrics == {"slides": 16, "slides_quarantined": 0, "patches": 16 * 192, "bad_tiles": 0}
    assert stages["train"].record.metrics["epoch"] == 1
    assert 0 <= stages["evaluate"].record.metrics["test_accuracy"] <= 1
