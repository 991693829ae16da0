from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.base import fingerprint
from pipeline.errors import CohortError, DataBudgetError, StageError
from pipeline.store.patches import SlideStatus
from pipeline.store.repair import repair_store
from pipeline.store.rows import asked_digest
from pipeline.tracking.tracker import open_tracking
from pipeline.workflow.stage import Record, Workspace
from pipeline.workflow.stages import STAGES, _check_budget, _warn_random_encoder, _warn_small_bags, ledger_csv
from tests.pipeline.small import small_config, store_slides, write_cohort


def _statuses(good: int, bad: int) -> list[SlideStatus]:
    fine = [SlideStatus(f"g{i}", f"/s/g{i}.svs", f"key{i}", "committed", None, 7, 0, None) for i in range(good)]
    wrong = [SlideStatus(f"b, {i}", "/s/b.svs", None, "quarantined", "no-tissue: empty", 0, 0, "") for i in range(bad)]
    return [*fine, *wrong]


@pytest.mark.parametrize(("good", "bad", "passes"), [(3, 1, True), (2, 2, False), (57, 3, True), (56, 4, False)])
def test_the_default_budget_is_a_twentieth_at_least_one(good: int, bad: int, *, passes: bool) -> None:
    if passes:
        _check_budget(small_config(), _statuses(0, bad), good + bad, "slides.csv")
    else:
        with pytest.raises(DataBudgetError, match=f"tiling.max_bad_slides={bad}"):
            _check_budget(small_config(), _statuses(0, bad), good + bad, "slides.csv")


def test_an_explicit_budget_of_zero_tolerates_none() -> None:
    strict = small_config(tiling={"max_bad_slides": 0})
    _check_budget(strict, _statuses(0, 0), 3, "slides.csv")
    with pytest.raises(DataBudgetError):
        _check_budget(strict, _statuses(0, 1), 4, "slides.csv")


def test_a_budget_that_is_far_exceeded_is_a_short_message() -> None:
    with pytest.raises(DataBudgetError) as caught:
        _check_budget(small_config(), _statuses(0, 5020), 5023, "/root/slides.csv")
    lines = str(caught.value).splitlines()
    assert [len(lines), lines[1]] == [23, "  - b, 0 (/s/b.svs): no-tissue: empty"]
    assert lines[-2] == "  and 5,000 more, all in /root/slides.csv"
    assert lines[-1].endswith("tiling.max_bad_slides=5020")


def test_files_that_are_missing_are_told_once_with_their_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slides = tuple(CohortSlide(f"s{n}", f"{tmp_path}/s{n}.svs", f"p{n}", None, None, {}, {}) for n in range(300))
    config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / "patches")})
    space = Workspace(config, Cohort("c.csv", slides), lambda: pytest.fail("no MLflow"), lambda: None, {})
    assert STAGES[0].identity(space)["slides"][7] == ["s7", asked_digest(slides[7], None)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"missing: 300 of 300 slides, such as: cannot read {tmp_path}/s0.svs: it does not exist")


@pytest.mark.parametrize(("train", "matters"), [({}, False), ({"keep_best": True}, True), ({"patience": 2}, True)])
def test_a_validation_slide_counts_where_it_chooses(tmp_path: Path, train: dict[str, object], *, matters: bool) -> None:
    cohort = write_cohort(tmp_path, ["no", "yes"])
    slides = (replace(cohort.slides[0], split="train"), replace(cohort.slides[1], split="val"))
    config = small_config(train=train, storage={"root": str(tmp_path), "patches": str(tmp_path / "patches")})
    pairs = store_slides(replace(cohort, slides=slides), tmp_path / "patches", config)
    records = {"tile": Record("tile", "f", {}, {}, {"keys": {slide.slide_id: stored.key for slide, stored in pairs}})}

    def identity(label: str) -> str:
        relabelled = (slides[0], replace(slides[1], labels={"tumour": label}))
        those = replace(cohort, slides=relabelled)
        space = Workspace(config, those, lambda: pytest.fail("no MLflow"), lambda: None, {}, records)
        return fingerprint(STAGES[1].identity(space))

    assert (identity("yes") != identity("no")) == matters


def test_the_ledger_is_a_csv_of_every_slide() -> None:
    rows = list(csv.DictReader(ledger_csv(_statuses(1, 1)).decode().splitlines()))
    assert [row["status"] for row in rows] == ["committed", "quarantined"]
    assert rows[1]["slide_id"] == "b, 0"
    assert rows[1]["reason"] == "no-tissue: empty"


def test_a_memory_above_every_bag_is_a_warning_and_no_bag_an_error(caplog: pytest.LogCaptureFixture) -> None:
    _warn_small_bags(small_config(), [4, 6])
    assert not caplog.records
    _warn_small_bags(small_config(), [4, 5])
    assert "model.select.memory=5 is not below the largest bag (5 patches): all patches are used" in caplog.text
    with pytest.raises(StageError, match="no slide of the train split is committed"):
        _warn_small_bags(small_config(), [])


def test_a_frozen_encoder_without_weights_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _warn_random_encoder(small_config())
    weights = {"stages": 2, "weights": "w.safetensors"}
    _warn_random_encoder(small_config(train={"freeze_encoder": True}, model={"encoder": weights}))
    assert not caplog.records
    _warn_random_encoder(small_config(train={"freeze_encoder": True}))
    assert "keeps the encoder as it is drawn at random" in caplog.text


def test_copies_of_one_image_do_not_train_and_test(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, ["no", "yes"])
    slides = (replace(cohort.slides[0], split="train"), replace(cohort.slides[1], split="test"))
    records = {"tile": Record("tile", "f", {}, {}, {"keys": {slide.slide_id: "k" for slide in slides}})}
    tracker = open_tracking(f"sqlite:///{tmp_path}/mlflow.db", "small", str(tmp_path / "artifacts"))
    space = Workspace(
        small_config(), replace(cohort, slides=slides), lambda: tracker, lambda: pytest.fail("no Ray"), {}, records
    )
    for stage in STAGES:
        if stage.name in ("train", "evaluate"):
            with pytest.raises(CohortError, match=r"'s0' \(train\) and 's1' \(test\) are copies of one image"):
                stage.work(space, "f", "run")


def test_a_slide_that_lost_patches_since_is_another_recipe_for_training_and_test(tmp_path: Path) -> None:
    """Its key is that of its content, so it stays."""
    config = small_config(storage={"patches": str(tmp_path / "patches")}, evaluate={"split": "train"})
    cohort = write_cohort(tmp_path, ["no", "yes"])
    cohort = replace(cohort, slides=tuple(replace(slide, split="train") for slide in cohort.slides))
    keys = {slide.slide_id: kept.key for slide, kept in store_slides(cohort, tmp_path / "patches", config)}
    records = {name: Record(name, "f", {}, {}, {"keys": keys}) for name in ("tile", "train")}
    space = Workspace(config, cohort, lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {}, records)
    stages = [stage for stage in STAGES if stage.name in ("train", "evaluate")]
    before = [fingerprint(stage.identity(space)) for stage in stages]
    assert [fingerprint(stage.identity(space)) for stage in stages] == before
    commit = tmp_path / "patches" / config.tiling.fingerprint() / keys["s0"] / "slide.json"
    facts = json.loads(commit.read_text())
    commit.write_text(json.dumps({**facts, "n_patches": facts["n_patches"] - 1}))
    repair_store(str(tmp_path / "patches"))
    space.look_again()
    assert not set(before) & {fingerprint(stage.identity(space)) for stage in stages}


def test_another_series_is_another_recipe_for_tiling(tmp_path: Path) -> None:
    config, cohort = small_config(storage={"patches": str(tmp_path)}), write_cohort(tmp_path, ["no"])
    (stage,) = (stage for stage in STAGES if stage.name == "tile")
    found = set()
    for series in (None, 0, 1):
        named = replace(cohort, slides=(replace(cohort.slides[0], series=series),))
        space = Workspace(config, named, lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {}, {})
        found.add(fingerprint(stage.identity(space)))
    assert len(found) == 3


def test_slides_that_were_too_expensive_are_tried_again_where_they_may_cost_more(tmp_path: Path) -> None:
    config = small_config(storage={"patches": str(tmp_path / "patches")})
    record = Record("tile", "f", {}, {}, {"keys": {}, "too_expensive": [[600.0, 2.0]]})

    def outdated(seconds: float, gib: float) -> str | None:
        tiling = config.tiling.model_copy(update={"max_seconds": seconds, "max_slide_gib": gib})
        changed = config.model_copy(update={"tiling": tiling})
        space = Workspace(changed, Cohort("c.csv", ()), lambda: pytest.fail("no tracker"), lambda: None, {})
        return STAGES[0].outdated(space, record)

    assert outdated(600, 2) is outdated(500, 1) is None
    assert outdated(601, 2) == outdated(600, 2.1) == "slides that were too expensive may take more now"


def test_a_tiled_slide_without_its_commit_is_not_done(tmp_path: Path) -> None:
    config = small_config(storage={"patches": str(tmp_path / "patches")})
    cohort = write_cohort(tmp_path, ["no", "yes"])
    stored = store_slides(cohort, tmp_path / "patches", config)
    record = Record("tile", "f", {}, {}, {"keys": {slide.slide_id: kept.key for slide, kept in stored}})
    space = Workspace(config, cohort, lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {})
    tile = STAGES[0]
    assert tile.outdated(space, record) is None
    (Path(stored[0][1].uri) / "slide.json").unlink()
    assert tile.outdated(space, record) == "1 slides are gone from the store: s0"
    shutil.rmtree(stored[1][1].uri)
    assert tile.outdated(space, record) == "2 slides are gone from the store: s0, s1"
