from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import TaskConfig
from pipeline.release.drift import (
    NUMBERS,
    Appearance,
    Sides,
    View,
    appearances,
    colours,
    find_drift,
    jpeg_quality,
    unusual,
)
from pipeline.store.patches import PatchStore
from tests.pipeline.small import small_config, store_slides, write_cohort

TASK = TaskConfig(name="tumour", column="label", classes=("no", "yes"))


def look(number: int, **changes: float) -> Appearance:
    """A made appearance."""
    generator = np.random.default_rng(number)
    numbers = {name: float(10 + generator.standard_normal()) for name in NUMBERS} | {"mpp": 0.5}
    picture = io.BytesIO()
    Image.new("RGB", (23, 17), (200, 90 + number % 100, 170)).save(picture, "JPEG")
    labels = {"tumour": "yes" if number % 2 else "no"}
    return Appearance(
        f"s{number}", f"p{number // 2}", {**numbers, **changes}, {"scanner": "aperio"}, labels, picture.getvalue()
    )


def sides(new: int = 20, old: int = 60, **changes: float) -> Sides:
    """Made ones; `changes` are the new slides' numbers."""
    return Sides(new, tuple(look(n, **(changes if n < new else {})) for n in range(new + old)), None)


def test_a_stain_that_moved_is_found_and_nothing_else() -> None:
    calm = find_drift(sides(), [TASK], 0)
    assert min(one.p for one in calm) > 0.05
    assert "tumour predictions" not in {one.name for one in calm}
    found = {one.name: one for one in find_drift(sides(eosin=14.0), [TASK], 0)}
    assert (found["eosin"].effect, found["eosin"].n_new, found["eosin"].n_old) == (1.0, 20, 60)
    assert found["eosin"].p < 0.01
    assert min(one.p for name, one in found.items() if name != "eosin") > 0.05
    assert next(iter(found)) == "eosin"


def test_labels_missing_ones_and_scanners_count() -> None:
    made = sides()
    changed = [
        replace(one, labels={"tumour": None if n % 3 else "yes"}, words={"scanner": "leica"}) if n < 20 else one
        for n, one in enumerate(made.slides)
    ]
    found = {one.name: one for one in find_drift(replace(made, slides=tuple(changed)), [TASK], 0)}
    assert found["scanner"].effect == 1.0
    assert found["tumour missing"].effect == pytest.approx(13 / 20)
    assert found["tumour labels"].n_new == 7
    assert max(found[name].p for name in ("scanner", "tumour missing")) < 0.01


def test_what_the_champion_makes_of_them_counts() -> None:
    made, generator = sides(), np.random.default_rng(0)
    views = [
        View(generator.standard_normal(6) + (3 if n < 20 else 0), {"tumour": np.array([0.4, 0.6])}) for n in range(80)
    ]
    found = {one.name: one for one in find_drift(replace(made, views=tuple(views)), [TASK], 0)}
    assert found["embeddings"].p < 0.01
    assert found["embeddings"].effect > 0.5
    assert (found["tumour predictions"].p, found["tumour predictions"].effect) == (1.0, 0.0)


def test_numbers_that_are_not_known_are_left_out() -> None:
    made = sides()
    blind = [replace(one, numbers={**one.numbers, "mpp": float("nan")}) for one in made.slides]
    blind[3] = replace(blind[3], numbers={**blind[3].numbers, "tissue": float("nan")})
    found = {one.name: one for one in find_drift(replace(made, slides=tuple(blind)), [TASK], 0)}
    assert "mpp" not in found
    assert found["tissue"].n_new == 19


def test_the_most_unusual_slide_is_told_with_its_number() -> None:
    made = sides()
    odd = replace(made.slides[4], numbers={**made.slides[4].numbers, "brightness": 40.0})
    found = unusual(replace(made, slides=(*made.slides[:4], odd, *made.slides[5:])))
    assert len(found) == 20
    assert max(range(20), key=lambda place: found[place][0]) == 4
    assert found[4][1] == "brightness"
    assert found[4][0] > 15


def test_stain_is_what_was_drawn_with() -> None:
    unit = np.array([0.65, 0.70, 0.29]) / np.linalg.norm([0.65, 0.70, 0.29])
    amount = np.full((40, 50, 1), 0.8)
    amount[::2] = 1.2
    rgb = np.rint(256 * np.exp(-amount * unit) - 1).astype(np.uint8)
    rgb[:, :20] = 244  # glass
    found = colours(rgb)
    assert found["haematoxylin"] == pytest.approx(1.0, abs=0.02)
    assert found["haematoxylin spread"] == pytest.approx(0.2, abs=0.02)
    assert abs(found["eosin"]) < 0.03
    assert np.isnan(list(colours(np.full((5, 4, 3), 244, np.uint8)).values())).all()


@pytest.mark.parametrize("quality", [55, 75, 90, 97])
def test_the_quality_of_a_jpeg_is_read_off_its_table(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 200)).save(file, "JPEG", quality=quality)
    assert jpeg_quality(file.getvalue()) == pytest.approx(quality, abs=1.0)


def test_stored_slides_are_described(tmp_path: Path) -> None:
    config = small_config()
    cohort = write_cohort(tmp_path, ["no", "yes", None])
    pairs = store_slides(cohort, tmp_path / "store", config)
    keys = {slide.slide_id: stored.key for slide, stored in pairs}
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())
    found = appearances(store, cohort.slides, keys)
    assert [one.slide_id for one in found] == ["s0", "s1", "s2"]
    assert found[2].labels == {"tumour": None}
    first, stored = found[0].numbers, pairs[0][1]
    assert set(first) == set(NUMBERS)
    assert first["patches"] == stored.n_patches
    assert first["JPEG quality"] == pytest.approx(90, abs=1)
    assert np.isnan(first["mpp"])
    assert 100 < first["brightness"] < 180  # the made texture's mean
