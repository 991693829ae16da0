from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.table import Cohort
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.demo.cohort import write_demo
from pipeline.errors import StageError
from pipeline.ingest.tiler import store_slide
from pipeline.jobs import cost
from pipeline.jobs.cost import Estimate, estimate
from pipeline.jobs.rates import Measured, Rates, kept_rates, measure
from pipeline.workflow.run import load_cohort
from tests.pipeline.small import HEIGHT, PATCH, WIDTH, small_config, write_cohort

_AREA = WIDTH / PATCH * HEIGHT / PATCH


def _cohort(folder: Path) -> Cohort:
    return write_cohort(folder, ["no", "yes", "no", "yes", "no", "yes", "yes"])  # all in the test split


def _rates(*slides: Measured) -> Rates:
    return Rates("a machine", "r", slides, score_s=0.5, train_s=2.0, when="")


def _rows(found: Sequence[Estimate]) -> dict[tuple[str, str], Estimate]:
    return {(one.what, one.unit): one for one in found}


def test_headers_times_rates(tmp_path: Path) -> None:
    config = small_config(cluster={"workers": 2, "cpus_per_worker": 3}, train={"epochs": 4})
    like = Measured(_AREA, 12, cpu_s=6.0, read_bytes=3e9, stored_bytes=1e9)
    rows = _rows(estimate(config, _cohort(tmp_path), _rates(like, like)))
    assert rows["patches", ""].likely == pytest.approx(7 * 12)
    assert rows["read by tiling", "GB"].likely == pytest.approx(7 * 3)
    assert rows["stored", "GB"].likely == pytest.approx(7 * 1)
    tile = rows["tile", "CPU hours"].likely
    assert tile == pytest.approx(7 * 6 / 3600)
    learn = 7 * 12 * 0.5 / 3600  # nothing trains: all of the cohort is its test
    assert rows["train and evaluate", "CPU hours"].likely == pytest.approx(3 * learn)
    assert rows["time on the cluster", "hours"].likely == pytest.approx(tile / 6 + learn / 2)
    assert ("train and evaluate", "GPU hours") not in rows
    for one in rows.values():
        assert one.low <= one.likely / 1.1 + 1e-9
        assert one.high >= one.likely * 1.1 - 1e-9
        assert one.rests_on


def test_a_training_counts_its_epochs_and_looks(tmp_path: Path) -> None:
    slides = _cohort(tmp_path).slides
    splits = ("train", "train", "train", "val", "val", "test", "test")
    split = tuple(replace(slide, split=name) for slide, name in zip(slides, splits, strict=True))
    config = small_config(train={"epochs": 5, "validate_every": 2}, cluster={"gpus_per_worker": 1})
    like = Measured(_AREA, 10, 1.0, 1.0, 1.0)
    rows = _rows(estimate(config, Cohort("c", split), _rates(like, like)))
    seconds = 3 * 10 * 5 * 2.0 + (2 * 10 * 3 + 2 * 10) * 0.5  # looks after epochs 2, 4 and the last
    gpu = rows["train and evaluate", "GPU hours"]
    assert gpu.likely == pytest.approx(seconds / 3600)
    assert "no GPU: measure on a GPU machine" in gpu.rests_on


def test_slides_that_differ_widen_the_range_and_one_says_nothing(tmp_path: Path) -> None:
    cohort, config = _cohort(tmp_path), small_config()

    def width(*slides: Measured) -> float:
        one = _rows(estimate(config, cohort, _rates(*slides)))["patches", ""]
        return one.high / one.likely

    alike = [Measured(_AREA, n, 1.0, 1.0, 1.0) for n in (10, 10, 10, 10)]
    unlike = [Measured(_AREA, n, 1.0, 1.0, 1.0) for n in (2, 18, 4, 16)]
    assert width(*alike) == pytest.approx(1.1)
    assert width(*unlike) > 1.5
    assert width(alike[0]) == pytest.approx(2.0)


def test_a_cohort_whose_slides_cannot_be_opened_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort = _cohort(tmp_path)
    Path(cohort.slides[0].uri).write_bytes(b"no image")
    like = Measured(_AREA, 10, 1.0, 1.0, 1.0)
    assert _rows(estimate(small_config(), cohort, _rates(like, like)))["patches", ""].likely == pytest.approx(70)
    assert "s0 is left out" in caplog.text
    for slide in cohort.slides:
        Path(slide.uri).write_bytes(b"no image")
    with pytest.raises(StageError, match="no slide's header can be read"):
        estimate(small_config(), cohort, _rates(like))


def test_a_large_cohort_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_HEADERS", 3)
    like = Measured(_AREA, 10, 1.0, 1.0, 1.0)
    (patches, *_) = estimate(small_config(), _cohort(tmp_path), _rates(like, like))
    assert patches.likely == pytest.approx(70)
    assert "headers of 3 of 7 slides" in patches.rests_on


def _demo(folder: Path, seed: int) -> tuple[Config, Cohort]:
    overrides = [f"storage.root={folder}", "cohort.demo.slides=12", f"cohort.demo.seed={seed}"]
    overrides += ["tiling.mpp=0.5", "tiling.patch_px=64"]  # so much to cut that what a slide costs beside it is little
    config = load_config("demo", overrides)
    assert config.cohort.demo is not None
    write_demo(str(Path(config.cohort.uri).parent), config.cohort.demo)
    return config, load_cohort(config, needs_labels=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_is_within_30_percent_on_slides_that_were_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.jobs.rates._SECONDS", 0.5)  # of training, which is not compared here
    measured, cohort = _demo(tmp_path / "a", seed=0)
    rates = measure(measured, cohort)
    assert kept_rates(measured) == [rates]
    config, held_out = _demo(tmp_path / "b", seed=1)
    rows = _rows(estimate(config, held_out, rates))
    began = time.process_time()
    store = tmp_path / "store"
    statuses = [store_slide(slide, config.tiling, str(store)) for slide in held_out.slides]
    cpu_hours = (time.process_time() - began) / 3600
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file() and "sources" not in path.parts)
    real = {
        ("patches", ""): sum(status.n_patches for status in statuses),
        ("stored", "GB"): stored / 1e9,
        ("tile", "CPU hours"): cpu_hours,
    }
    for name, value in real.items():
        assert value / 1.3 < rows[name].likely < value * 1.3, (name, value, rows[name])
