from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ips.bag import TensorBag
from ips.network.model import evaluating
from ips.selection.baselines import every_patch
from ips.selection.select import gather
from pipeline.bags.patch_bag import PatchBag
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.inference.prediction import load_model, predict_bag, predict_slide, unpredicted
from pipeline.ingest.tiler import store_slide
from pipeline.schema import ATTENTION
from pipeline.store.patches import PatchStore
from pipeline.tiling.slide import effective_mpp
from tests.pipeline.small import PATCH, small_config, write_model, write_slide
from tests.synth import tissue_rgb, write_pyramid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), small_config())


def _bag(n: int) -> TensorBag:
    torch.manual_seed(n)
    return TensorBag(torch.randint(0, 256, (n, 3, PATCH, PATCH), dtype=torch.uint8))


def test_a_bag_gives_probabilities_and_the_whole_bag_attention(folder: Path) -> None:
    model, config = load_model(folder)
    found = predict_bag(model, _bag(23), config)
    assert found.values["tumour"].shape == (2,)
    assert found.values["tumour"].sum() == pytest.approx(1.0)
    assert found.attention.shape == (23,)
    assert found.attention.sum() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(found.selected, np.argsort(-found.attention, kind="stable")[:5])


def test_a_bag_shorter_than_the_memory_is_used_whole(folder: Path) -> None:
    model, config = load_model(folder)
    found = predict_bag(model, _bag(3), config)
    assert sorted(found.selected.tolist()) == [0, 1, 2]


def test_a_bag_prediction_is_the_model_in_evaluation_mode_and_modes_come_back(folder: Path) -> None:
    model, config = load_model(folder)
    model.train()
    model.encoder.eval()
    bag = _bag(4)
    found = predict_bag(model, bag, config)
    assert model.training
    assert not model.encoder.training

    model.eval()
    with torch.inference_mode():
        tokens = model.aggregator(model.embed(bag.patches[found.selected])[None], torch.ones(1, 4, dtype=torch.bool))
        positive = torch.sigmoid(model.heads["tumour"](tokens[:, 0])).item()
    assert found.values["tumour"][1] == pytest.approx(positive, abs=1e-6)


@pytest.mark.parametrize(
    ("pool", "mode"), [("attention", "random"), ("attention", "every"), ("gated", "every"), ("max", "random")]
)
def test_baselines_say_what_they_looked_at(tmp_path: Path, pool: str, mode: str) -> None:
    plain = {
        "encoder": {"stages": 2},
        "aggregator": {"pool": pool, "heads": 2, "key_dim": 4, "hidden_dim": 16},
        "select": {"mode": mode, "memory": 5, "chunk": 4},
        "positions": "index",
    }
    model, config = load_model(write_model(tmp_path, small_config(model=plain)))
    bag = _bag(11)
    found, again = predict_bag(model, bag, config), predict_bag(model, bag, config)
    assert found.selected.tolist() == again.selected.tolist()
    assert len(set(found.selected.tolist())) == (5 if mode == "random" else 11)
    assert found.attention.sum() == pytest.approx(1.0, abs=1e-6)
    assert sorted(np.flatnonzero(found.attention)) == sorted(found.selected)
    assert np.all(np.diff(found.attention[found.selected]) <= 0)
    assert (len(set(found.attention[found.selected].tolist())) > 1) == (pool == "gated")
    model.eval()
    rows = torch.from_numpy(np.sort(found.selected))
    with torch.inference_mode():
        logits = model.pool(model.embed(bag.patches[rows]), torch.ones(1, len(rows), dtype=torch.bool), rows[None])
    assert found.logits["tumour"] == pytest.approx(logits["tumour"].numpy()[0], abs=1e-5)


@pytest.mark.parametrize("mode", ["exact", "window"])
def test_with_context_a_prediction_is_that_of_all_patches_whatever_the_memory(tmp_path: Path, mode: str) -> None:
    bag, answers = _bag(23), []
    for memory in (1, 5, 40):
        plain = small_config().model.model_dump(mode="json")
        plain["select"] = {"mode": mode, "memory": memory, "chunk": 4, "context": "all"}
        model, config = load_model(write_model(tmp_path, small_config(model=plain)))
        found = predict_bag(model, bag, config)
        assert len(found.selected) == min(memory, 23)
        assert found.attention.sum() == pytest.approx(1.0, abs=1e-6)
        answers.append(found)
    with evaluating(model), torch.inference_mode():
        wanted = model(gather([bag], every_patch([bag]), "cpu"))
    for found in answers:
        assert np.array_equal(found.logits["tumour"], answers[0].logits["tumour"])
        np.testing.assert_array_equal(
            found.selected, np.argsort(-found.attention, kind="stable")[: len(found.selected)]
        )
    assert answers[0].logits["tumour"] == pytest.approx(wanted["tumour"].numpy()[0], abs=1e-5)


def test_a_multiclass_head_gives_a_softmax(tmp_path: Path) -> None:
    task = {"name": "grade", "column": "g", "kind": "multiclass", "classes": ["a", "b", "c"]}
    model, config = load_model(write_model(tmp_path, small_config(tasks=[task])))
    found = predict_bag(model, _bag(6), config)
    assert found.values["grade"].shape == (3,)
    assert found.values["grade"].sum() == pytest.approx(1.0)


def test_a_slide_is_tiled_and_predicted(folder: Path, tmp_path: Path) -> None:
    model, config = load_model(folder)
    write_slide(tmp_path / "s.png", 1)
    slide = CohortSlide("s", str(tmp_path / "s.png"), "p", None, None, {}, {})
    found = predict_slide(model, config, slide)
    assert found.attention.schema.equals(ATTENTION)
    assert found.attention.num_rows == 20  # 5 of 6 columns hold tissue, on 4 rows
    assert found.attention.column("x").to_pylist()[:6] == [0, 32, 64, 96, 128, 0]
    assert sum(found.attention.column("selected").to_pylist()) == 5
    assert found.extent == PATCH
    assert found.found.pooled is None
    assert predict_slide(model, config, slide, pooled=True).found.pooled is not None
    assert found.values["tumour"].sum() == pytest.approx(1.0)


def test_with_surroundings_a_slide_is_predicted_as_from_its_store(tmp_path: Path) -> None:
    """Cut while it is read, and stored; and what lies around the patches decides, too."""
    tiling = {"patch_px": 32, "tissue": "none", "context_mpp": 2.0}
    model, config = load_model(write_model(tmp_path, small_config(tiling=tiling)))
    path = write_pyramid(tmp_path / "a.tiff", tissue_rgb(211, 157), tile=32)
    slide = CohortSlide("a", str(path), "p", None, None, {}, {})
    status = store_slide(slide, config.tiling, str(tmp_path / "store"))
    stored = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint()).slide(str(status.key))
    bag = PatchBag([stored], threads=1, augment=None)
    kept, found = predict_bag(model, bag, config), predict_slide(model, config, slide)
    assert np.array_equal(found.found.attention, kept.attention)
    assert np.array_equal(found.values["tumour"], kept.values["tumour"])
    pixels = bag.take(torch.arange(len(bag))).patches.clone()
    pixels[:, :, 32:] = pixels[:, :, 32:].flip(0)  # of another patch
    assert not np.allclose(predict_bag(model, TensorBag(pixels), config).attention, kept.attention, atol=1e-4)


def test_a_slide_that_cannot_be_used_raises(folder: Path, tmp_path: Path) -> None:
    model, config = load_model(folder)
    (tmp_path / "bad.svs").write_bytes(b"not a slide")
    with pytest.raises(SlideError, match=r"bad\.svs"):
        predict_slide(model, config, CohortSlide("b", str(tmp_path / "bad.svs"), "p", None, None, {}, {}))
    with pytest.raises(SlideError, match=r"none\.svs"):
        predict_slide(model, config, CohortSlide("n", str(tmp_path / "none.svs"), "p", None, None, {}, {}))


@pytest.mark.parametrize(
    ("box", "tiling", "expected"),
    [
        (
            (0, 0, 211, 157),
            {"mpp": 0.5},
            "coarser than tiling.mpp=0.5; patches are never enlarged; if that is wrong, give the right",
        ),
        ((0, 0, 8, 9), {"edge": "drop"}, "(tiling.patch_px=32); how it is tiled is the model's and cannot be set here"),
        ((165, 0, 211, 157), {"min_tissue": 1.0}, "; how it is tiled is the model's and cannot be set here"),
    ],
    ids=["too-coarse", "too-small", "no-tissue"],
)
def test_a_remedy_is_one_that_a_model_leaves_open(
    tmp_path: Path, box: tuple[int, int, int, int], tiling: dict[str, object], expected: str
) -> None:
    """Not a setting of its tiling."""
    model, config = load_model(write_model(tmp_path, small_config(tiling={"patch_px": PATCH, "mpp": None} | tiling)))
    write_slide(tmp_path / "s.png", 1)
    with Image.open(tmp_path / "s.png") as image:
        image.crop(box).save(tmp_path / "s.png")
    with pytest.raises(SlideError) as caught:
        predict_slide(model, config, CohortSlide("s", str(tmp_path / "s.png"), "p", None, 2.0, {}, {}))
    said = unpredicted(caught.value, "with --mpp")
    assert expected in said
    assert "set tiling" not in said
    assert "lower tiling" not in said
    assert "cohort" not in said


def test_microns_of_px_that_are_not_square_are_given_where_they_can_be() -> None:
    with pytest.raises(SlideError) as caught:
        effective_mpp((0.25, 0.5), TilingConfig(), None)
    said = unpredicted(caught.value, "with --mpp")
    assert "and give 0.5 with --mpp, which says that px are square" in said
    assert "cohort" not in said
