"""A patient of several slides, against the same slides put together by hand."""

from __future__ import annotations

import io
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ips.bag import TensorBag
from pipeline.bags.augment import Augment
from pipeline.bags.patients import PatientSlides, by_patient, merged
from pipeline.bags.sources import open_bag, slides_of
from pipeline.cohort.table import Cohort
from pipeline.config.recipe import Config
from pipeline.errors import SlideError
from pipeline.inference.prediction import predict_bag, predict_together
from pipeline.model.build import build_model, build_optimizer
from pipeline.results.evaluate import evaluate
from pipeline.results.report import render_report
from pipeline.store.features import FeatureStore
from pipeline.training.hands import Slides
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from tests.pipeline.small import HEIGHT, WIDTH, small_config, store_slides, write_cohort


def patients_config(folder: Path, **changes: Any) -> Config:
    cohort = {"uri": str(folder / "cohort.csv"), "bag": "patient"}
    return small_config(cohort=cohort, storage={"root": str(folder), "patches": str(folder / "store")}, **changes)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Config, Cohort, list[tuple[Any, Any]]]:
    """Five slides of three patients: two, two, one."""
    config = patients_config(tmp_path)
    cohort = write_cohort(tmp_path, ["no", None, "yes", "yes", "no"])
    pairs = store_slides(cohort, tmp_path / "store", config)
    return config, cohort, list(zip(by_patient(pairs), [pairs[:2], pairs[2:4], pairs[4:]], strict=True))


@pytest.mark.parametrize("augment", [None, Augment(7, 3, "", 0.2)])
def test_a_patient_s_bag_is_its_slides_bags_one_after_another(opened: Any, augment: Augment | None) -> None:
    """Pixels, positions and what augmentation makes of them."""
    _, _, patients = opened
    assert [row.slide_id for (row, _), _ in patients] == ["p0", "p1", "p2"]
    for (_, source), slides in patients:
        bag = open_bag(source, threads=1, augment=augment)
        assert len(bag) == sum(stored.n_patches for _, stored in slides)
        alone = [
            open_bag(stored, threads=1, augment=None if augment is None else replace(augment, key=stored.key))
            for _, stored in slides
        ]
        rows = torch.arange(len(bag))
        chunk: Any = bag.take(rows)
        wanted: list[Any] = [one.take(torch.arange(len(one))) for one in alone]
        assert torch.equal(chunk.patches, torch.cat([one.patches for one in wanted]))
        assert torch.equal(chunk.positions, torch.cat([one.positions for one in wanted]))
        if augment is not None:
            changed = torch.cat([one.prepare(one.patches) for one in wanted])
            assert torch.equal(chunk.prepare(chunk.patches), changed)


def test_selection_and_prediction_are_over_all_of_a_patient_s_patches(opened: Any) -> None:
    config, cohort, patients = opened
    torch.manual_seed(3)
    model = build_model(config)
    for (_, source), slides in patients:
        bags = [open_bag(stored, threads=1, augment=None) for _, stored in slides]
        pixels = torch.cat([bag.take(torch.arange(len(bag))).patches for bag in bags])
        by_hand = predict_bag(model, TensorBag(pixels), config)
        found = predict_bag(model, open_bag(source, threads=1, augment=None), config)
        assert np.array_equal(found.values["tumour"], by_hand.values["tumour"])
        assert np.array_equal(found.attention, by_hand.attention)
        assert np.array_equal(found.selected, by_hand.selected)
        parts = predict_together(model, config, [slide for slide, _ in slides])
        for part, (slide, stored) in zip(parts, slides, strict=True):
            assert np.array_equal(part.values["tumour"], by_hand.values["tumour"])
            assert set(part.attention["slide_id"].to_pylist()) == {slide.slide_id}
            assert part.attention["x"].to_pylist() == stored.index().x.tolist()
        whole = np.concatenate([part.attention["attention"].to_numpy() for part in parts])
        assert np.array_equal(whole, by_hand.attention)
        picked = np.concatenate([part.attention["selected"].to_numpy(zero_copy_only=False) for part in parts])
        assert sorted(np.flatnonzero(picked)) == sorted(by_hand.selected)
    missing = replace(cohort.slides[0], uri="absent.png")
    with pytest.raises(SlideError, match=r"slide 's0' of this patient: .*absent"):
        predict_together(model, config, [cohort.slides[1], missing])


def test_the_plane_of_its_pictures(opened: Any) -> None:
    """Two slides side by side; each patch lies over its slide's part of the picture."""
    _, _, patients = opened
    (_, source), slides = patients[0]
    assert source.thumbnail_scale == 1
    picture = np.asarray(Image.open(io.BytesIO(source.thumbnail())).convert("RGB")).astype(int)
    assert picture.shape == (HEIGHT, 2 * WIDTH + 16, 3)
    index, n = source.index(), slides[0][1].n_patches
    first, second = (stored.index() for _, stored in slides)
    assert np.array_equal(index.x[:n], first.x)
    assert np.array_equal(index.x[n:], second.x + WIDTH + 16)
    assert np.array_equal(index.y, np.concatenate([first.y, second.y]))
    for x, y in zip(index.x.tolist(), index.y.tolist(), strict=True):
        assert picture[y + 8 : y + 24, x + 8 : x + 24, 1].mean() < 200  # tissue, and no glass
    rows = np.array([n + 3, 0, n, 2])
    (_, a), (_, b) = slides
    wanted = [b.payloads([3]), a.payloads([0]), b.payloads([0]), a.payloads([2])]
    assert source.payloads(rows) == [one for (one,) in wanted]


def test_slides_of_another_resolution_have_patches_of_one_size_in_pictures(opened: Any) -> None:
    _, _, patients = opened
    (_, source), _ = patients[0]
    coarse = replace(source.slides[1], downsample=2.0)
    mixed = PatientSlides(source.names, (source.slides[0], coarse))
    assert mixed.extent == source.extent
    n = source.slides[0].n_patches
    assert np.array_equal(mixed.index().y[n:], np.rint(coarse.index().y / 2))


def test_one_slide_is_itself_and_keys_are_those_of_the_slides(opened: Any) -> None:
    _, _, patients = opened
    (_, one), ((_, stored),) = patients[2]
    assert one.key == stored.key
    (_, two), slides = patients[0]
    assert [slide.key for slide in slides_of(two)] == [stored.key for _, stored in slides]
    assert two.key not in [stored.key for _, stored in slides]
    assert slides_of(stored) == (stored,)
    assert PatientSlides(two.names[::-1], two.slides[::-1]).key != two.key


def test_of_several_specimens_each_is_a_bag_as_put_together_by_hand(opened: Any) -> None:
    """Three slides of one patient are of two blocks, which another patient's slides name alike."""
    config, _, patients = opened
    pairs = [pair for _, slides in patients for pair in slides]
    blocks, owners, labels = "BABAA", "pppqq", ("no", "yes", None, "no", "no")
    told = [
        (replace(slide, patient_id=owner, extra={"block": block, "site": "x"}, labels={"tumour": label}), stored)
        for (slide, stored), block, owner, label in zip(pairs, blocks, owners, labels, strict=True)
    ]
    found = by_patient(told, "block")
    assert [(row.slide_id, row.patient_id) for row, _ in found] == [("p/B", "p"), ("p/A", "p"), ("q/A", "q")]
    assert [source.names for _, source in found] == [("s0", "s2"), ("s1",), ("s3", "s4")]
    assert [row.extra for row, _ in found] == [{"block": one, "site": "x"} for one in "BAA"]
    torch.manual_seed(3)
    model = build_model(config)
    for (_, source), members in zip(found, ([0, 2], [1], [3, 4]), strict=True):
        bags = [open_bag(pairs[place][1], threads=1, augment=None) for place in members]
        pixels = torch.cat([bag.take(torch.arange(len(bag))).patches for bag in bags])
        by_hand = predict_bag(model, TensorBag(pixels), config)
        whole = predict_bag(model, open_bag(source, threads=1, augment=None), config)
        assert np.array_equal(whole.values["tumour"], by_hand.values["tumour"])
        assert np.array_equal(whole.attention, by_hand.attention)
    tested = evaluate(model, config, found)
    assert tested.predictions["slide_id"].to_pylist() == ["p/B", "p/A", "q/A"]
    assert (tested.metrics["test_slides"], tested.metrics["test_patients"]) == (3, 2)


def test_a_patient_s_row_has_the_label_that_any_slide_has(opened: Any) -> None:
    _, cohort, patients = opened
    assert [row.labels["tumour"] for (row, _), _ in patients] == ["no", "yes", "no"]
    slides = [replace(slide, extra={"site": "a", "scanner": str(n)}) for n, slide in enumerate(cohort.slides[:2])]
    assert merged(slides, "p").extra == {"site": "a", "scanner": "several"}


def test_features_of_several_slides(opened: Any, tmp_path: Path) -> None:
    _, _, patients = opened
    (_, source), slides = patients[0]
    store = FeatureStore(str(tmp_path / "features"), "spec", "encoder")
    generator = np.random.default_rng(0)
    made = [generator.normal(size=(stored.n_patches, 5)).astype(np.float16) for _, stored in slides]
    written = [store.write(stored, [array], {}) for (_, stored), array in zip(slides, made, strict=True)]
    bag = open_bag(PatientSlides(source.names, tuple(written)), threads=1, augment=None)
    whole = np.concatenate(made)
    assert np.array_equal(torch.cat([chunk.patches for chunk in bag.chunks(7)]).numpy(), whole)
    rows = torch.tensor([len(whole) - 1, 0, 3, len(made[0])])
    assert np.array_equal(bag.take(rows).patches.numpy(), whole[rows.numpy()])


def test_the_test_is_by_patient(opened: Any) -> None:
    config, cohort, patients = opened
    found = evaluate(build_model(config), config, [pair for pair, _ in patients])
    assert found.predictions["slide_id"].to_pylist() == ["p0", "p1", "p2"]
    assert found.metrics["test_slides"] == found.metrics["test_patients"] == 3
    assert "p1" in render_report(found, config, cohort, {})


def test_a_lesion_on_one_of_three_slides_decides(tmp_path: Path) -> None:
    """Twelve patients of three slides with features; half of them have two lesion patches, on their second slide."""
    config = patients_config(
        tmp_path,
        model={
            "encoder": {"name": "features", "features": 6, "dim": 16},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16, "dropout": 0.0},
            "select": {"memory": 64, "chunk": 16},  # all: so few from scratch would settle on any
        },
        embed={"encoder": {"name": "resnet18"}},
        train={"epochs": 12, "batch_size": 4, "lr": 1e-2, "warmup_epochs": 1, "augment": False},
    )
    ((_, stored),) = store_slides(write_cohort(tmp_path, ["no"]), tmp_path / "store", config)
    store, generator = FeatureStore(str(tmp_path / "features"), "s", "e"), np.random.default_rng(5)
    patients = []
    for patient in range(12):
        slides = []
        for number in range(3):
            vectors = generator.normal(range(6), 0.2, size=(stored.n_patches, 6)).astype(np.float32)
            if patient % 2 and number == 1:
                vectors[[4, 7]] = range(5, -1, -1)
            slides.append(store.write(replace(stored, key=f"{patient}{number}".rjust(32, "0")), [vectors], {}))
        patients.append(PatientSlides(("a", "b", "c"), tuple(slides)))
    bags = [open_bag(patient, threads=1, augment=None) for patient in patients]
    held = [TensorBag(bag.take(torch.arange(len(bag))).patches) for bag in bags]  # read once
    training = Slides(
        sizes=[len(bag) for bag in held[:8]],
        targets=[{"tumour": float(number % 2)} for number in range(8)],
        kinds={"tumour": "binary"},
        bag=lambda index, _epoch: held[index],
    )
    torch.manual_seed(0)
    model = build_model(config)
    optimizer = build_optimizer(model, config.train)
    settings = config.train, config.model.select
    deque(train_steps(model, optimizer, training, *settings, seed=0, start_epoch=0, ranks=Ranks()), maxlen=0)
    found = [predict_bag(model, bag, config) for bag in bags[8:]]
    without, lesion = ([one.values["tumour"][1] for one in found[first::2]] for first in (0, 1))
    assert max(without) < min(lesion)
    for one in found[1::2]:
        assert set(one.selected[:2]) == {stored.n_patches + 4, stored.n_patches + 7}
