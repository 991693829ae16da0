from __future__ import annotations

import csv
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.config.data import DemoConfig
from pipeline.demo.cohort import BURDEN, DemoSlide, plan_cohort, write_demo
from pipeline.demo.picture import SHARES, SITES, Extent, draw_slide
from pipeline.errors import StorageError
from pipeline.slides.open import open_slide
from pipeline.tiling.tissue import find_tissue

F64 = npt.NDArray[np.float64]


@pytest.mark.parametrize("slides", [12, 73, 120])
def test_labels_patients_and_sites_are_balanced(slides: int) -> None:
    cohort = plan_cohort(DemoConfig(slides=slides, seed=3))
    assert len({slide.slide_id for slide in cohort}) == slides
    assert abs(slides - 2 * sum(slide.label for slide in cohort)) <= 1
    owned = Counter(slide.patient_id for slide in cohort)
    assert set(owned.values()) == {1, 2}
    assert len({(slide.patient_id, slide.extent, slide.site) for slide in cohort}) == len(owned)
    few, many = (sum(slide.extent is extent for slide in cohort) for extent in (Extent.FEW, Extent.MANY))
    assert few - many in (0, 1)
    for extent in Extent:
        patients = {slide.patient_id: slide.site for slide in cohort if slide.extent is extent}
        counts = Counter(patients.values())
        assert max(counts.values()) - min(counts[site] for site in SITES) <= 1


def test_the_answers_follow_from_how_much_there_is_of_lesions() -> None:
    cohort = plan_cohort(DemoConfig(slides=12))
    assert {(slide.extent, slide.label, slide.burden) for slide in cohort} == {
        (Extent.NONE, 0, 0),
        (Extent.FEW, 1, 0),
        (Extent.MANY, 1, 1),
    }
    assert SHARES[Extent.FEW][1] + 0.005 < BURDEN < SHARES[Extent.MANY][0] - 0.005  # half a nest is 0.5% of the tissue


@pytest.mark.parametrize("slides", [12, 24, 160])
def test_trainings_and_tests_have_all_extents(slides: int) -> None:
    cohort = plan_cohort(DemoConfig(slides=slides))
    assert len({(slide.patient_id, slide.split) for slide in cohort}) == len({slide.patient_id for slide in cohort})
    for split in ("train", "test"):
        assert {slide.extent for slide in cohort if slide.split == split} == set(Extent)
    assert any(slide.split == "val" for slide in cohort)


def test_the_default_cohort_leaves_enough_for_a_test() -> None:
    cohort = plan_cohort(DemoConfig())
    test = [slide for slide in cohort if slide.split == "test"]
    assert len(test) >= 36
    assert len({slide.patient_id for slide in test}) >= 24
    assert min(Counter(slide.extent for slide in test).values()) >= 8


def test_the_seed_changes_the_order() -> None:
    labels = [[slide.label for slide in plan_cohort(DemoConfig(seed=seed))] for seed in (0, 0, 1)]
    assert labels[0] == labels[1] != labels[2]


def test_the_cohort_on_disk(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    uri = write_demo(str(tmp_path / "co hort"), DemoConfig(slides=12), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]
    assert uri == str(tmp_path / "co hort" / "cohort.csv")
    with Path(uri).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "uri", "patient_id", "site", "split", "label", "burden"]
    answers = [(str(slide.label), str(slide.burden)) for slide in plan_cohort(DemoConfig(slides=12))]
    assert [(row["label"], row["burden"]) for row in rows] == answers
    for row in rows:
        path = Path(uri).parent / row["uri"]
        assert path.stat().st_size < 3_000_000
        with open_slide(path) as slide:
            width, height = slide.dimensions
            assert (slide.vendor, slide.mpp) == ("generic-tiff", (0.5, 0.5))
            assert width != height
            assert 1200 <= min(width, height) <= max(width, height) <= 3400
            assert len(slide.levels) >= 3


def test_a_cohort_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file: cannot be made"):
        write_demo(str(tmp_path / "file"), DemoConfig(slides=12))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_colours_do_not_tell_the_classes_apart(seed: int) -> None:
    """Logistic regression on the mean and deviation of a slide's colours stays at or below an AUC of 0.65."""
    cohort = plan_cohort(DemoConfig(seed=seed))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        features = np.stack(list(pool.map(lambda slide: _colours(slide, seed), cohort)))
    answers = [[slide.label for slide in cohort], [slide.burden for slide in cohort]]
    patients = np.array([slide.patient_id for slide in cohort])
    for labels in np.array(answers, np.float64):
        for columns in (slice(0, 6), slice(6, 12), slice(0, 12)):
            x = features[:, columns]
            assert np.mean([_cross_validated_auc(x, labels, patients, fold) for fold in range(5)]) <= 0.65


def _colours(slide: DemoSlide, seed: int) -> F64:
    """(12,): mean and deviation of R, G, B over the thumbnail, and over its tissue."""
    picture = draw_slide((seed, 1, slide.number), slide.extent, SITES.index(slide.site))
    height, width = (edge // 8 * 8 for edge in picture.rgbx.shape[:2])
    blocks = picture.rgbx[:height, :width, :3].reshape(height // 8, 8, width // 8, 8, 3)
    thumbnail = blocks.mean((1, 3), dtype=np.float32).astype(np.uint8)
    every, tissue = thumbnail.reshape(-1, 3), thumbnail[find_tissue(thumbnail).mask]
    return np.concatenate([every.mean(0), every.std(0), tissue.mean(0), tissue.std(0)]).astype(np.float64)


def _cross_validated_auc(x: F64, y: F64, patients: npt.NDArray[np.str_], seed: int) -> float:
    """Of out-of-fold scores, five folds by patient."""
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    fold = np.array([np.flatnonzero(names == patient)[0] % 5 for patient in patients])
    scores = np.zeros(len(y))
    for held_out in range(5):
        train = fold != held_out
        z = np.column_stack([(x - x[train].mean(0)) / x[train].std(0), np.ones(len(y))])
        weights = np.zeros(z.shape[1])
        for _ in range(30):  # Newton's method, a little ridge
            p = 1 / (1 + np.exp(-z[train] @ weights))
            hessian = (z[train].T * (p * (1 - p))) @ z[train] + 0.1 * np.eye(len(weights))
            weights += np.linalg.solve(hessian, z[train].T @ (y[train] - p) - 0.1 * weights)
        scores[~train] = z[~train] @ weights
    ranks = np.argsort(np.argsort(scores)) + 1.0
    positives = y.sum()
    return float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(y) - positives)))
