"""From slides to a model that trains on features: the paper's CAMELYON16 setting, M = I = 5000, on the demo cohort."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ips.network.aggregator import Aggregator
from ips.network.model import IPSModel
from ips.selection.select import gather, select
from pipeline.bags.embed import Embedder, embed_slide
from pipeline.bags.feature_bag import FeatureBag
from pipeline.bags.sources import feature_store, open_bag, open_sources
from pipeline.cohort.table import Cohort
from pipeline.config.compose import load_config
from pipeline.config.embed import EmbedConfig
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.inference.prediction import load_model, predict_slide
from pipeline.model.build import build_encoder, build_model, build_optimizer
from pipeline.predictions.run import predict
from pipeline.results.export import export_features
from pipeline.store.features import FeatureStore
from pipeline.training.hands import Slides
from pipeline.training.loop import train_steps
from pipeline.training.ranks import Ranks
from pipeline.workflow.embed import EMBED, stages_for
from pipeline.workflow.run import finished, load_cohort, plan, run
from pipeline.workflow.stage import Record, Workspace
from tests.pipeline.small import small_config, store_slides, write_cohort
from tests.synth import tissue_rgb


def features_config(root: Path, *more: str) -> Config:
    """The demo with a random truncated ResNet-18 as the frozen encoder (D = 128)."""
    return load_config(
        "demo",
        [
            f"storage.root={root}", "cohort.demo.slides=16", "model=features", "model.encoder.features=128",
            "model.encoder.dim=64", "embed.encoder.name=resnet18", "embed.encoder.stages=2", "train.augment=false",
            "train.epochs=1", "train.explore_epochs=0", "train.warmup_epochs=0", "evaluate.bootstrap=20", *more,
        ],
    )  # fmt: skip


def test_the_stage_stands_between_tiling_and_training_where_features_are_wanted(tmp_path: Path) -> None:
    wanted = features_config(tmp_path)
    assert [stage.name for stage in stages_for(wanted, "train")] == ["tile", "embed", "train"]
    assert [stage.name for stage in stages_for(small_config(), "train")] == ["tile", "train"]
    assert [stage.name for stage in stages_for(small_config(), "embed")] == ["tile", "embed"]


def test_features_without_their_commit_are_made_again(tmp_path: Path) -> None:
    config = small_config(
        storage={"patches": str(tmp_path / "patches"), "features": str(tmp_path / "features")},
        embed={"encoder": {"name": "resnet18", "stages": 2}, "batch": 8},
    )
    cohort = write_cohort(tmp_path, ["no", "yes"])
    stored = store_slides(cohort, tmp_path / "patches", config)
    store, settings = feature_store(config)
    for _, slide in stored:
        embed_slide(Embedder(settings), slide, store, threads=1)
    store.append([row for _, slide in stored for row in store.rows(slide.key)])
    tile = Record("tile", "f", {}, {}, {"keys": {slide.slide_id: kept.key for slide, kept in stored}})
    space = Workspace(
        config, cohort, lambda: pytest.fail("no tracker"), lambda: pytest.fail("no Ray"), {}, {"tile": tile}
    )
    assert EMBED.outdated(space, tile) is None
    (tmp_path / "features" / store.uri.rpartition("/")[2] / stored[1][1].key / "slide.json").unlink()
    assert EMBED.outdated(space, tile) == "1 slides are gone from the features: s1"


def test_a_model_learns_from_features_and_predicts_a_new_slide(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk, dim = build_encoder(EmbedConfig.model_validate({"encoder": {"name": "resnet18", "stages": 2}}).encoder)
    torch.save(trunk.state_dict(), tmp_path / "w.pth")
    config = small_config(
        storage={"patches": str(tmp_path / "patches"), "features": str(tmp_path / "features")},
        embed={"encoder": {"name": "resnet18", "stages": 2, "weights": str(tmp_path / "w.pth")}, "batch": 8},
        model={
            "encoder": {"name": "features", "features": dim, "dim": 16},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16, "dropout": 0.0},
            "select": {"memory": 5000, "chunk": 5000},
        },
        train={"epochs": 12, "batch_size": 4, "lr": 1e-2, "warmup_epochs": 1, "augment": False},
    )
    cohort = write_cohort(tmp_path, ["no", "yes", "no", "yes"])
    stored = store_slides(cohort, tmp_path / "patches", config)
    store, settings = feature_store(config)
    for _, slide in stored:
        embed_slide(Embedder(settings), slide, store, threads=1)
    store.append([row for _, slide in stored for row in store.rows(slide.key)])
    sources = open_sources(config, cohort.slides, {slide.slide_id: kept.key for slide, kept in stored})
    bags = [open_bag(source, threads=1, augment=None) for _, source in sources]
    slides = Slides(
        sizes=[len(bag) for bag in bags],
        targets=[{"tumour": float(number % 2)} for number in range(4)],
        kinds={"tumour": "binary"},
        bag=lambda index, _epoch: bags[index],
    )
    model = build_model(config)
    optimizer = build_optimizer(model, config.train)
    steps = list(
        train_steps(model, optimizer, slides, config.train, config.model.select, seed=0, start_epoch=0, ranks=Ranks())
    )
    assert steps[-1].loss < 0.7 * steps[0].loss
    found = predict_slide(model, config, cohort.slides[1])
    assert found.attention["attention"].to_numpy().sum() == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "features").is_dir()

    narrow = config.model.encoder.model_copy(update={"features": 7})
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"encoder": narrow})})
    with pytest.raises(ConfigError, match=rf"have {dim}; set model.encoder.features={dim}"):
        open_sources(wrong, cohort.slides, {slide.slide_id: kept.key for slide, kept in stored})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_from_slides_to_a_model_on_features(ray_session: None, tmp_path: Path) -> None:
    config = features_config(tmp_path / "root")
    assert (config.model.select.memory, config.model.select.chunk) == (5000, 5000)
    first = run(config, "evaluate")
    assert {name: stage.outcome for name, stage in first.stages.items()} == dict.fromkeys(
        ("tile", "embed", "train", "evaluate"), "done"
    )
    tiled, embedded = first.stages["tile"].record, first.stages["embed"].record
    assert embedded.metrics["features"] == tiled.metrics["patches"]
    assert {"read", "decode", "transfer", "encode"} <= set(embedded.facts["work"])
    assert 0 <= first.stages["evaluate"].record.metrics["test_auc"] <= 1
    assert Path(first.stages["evaluate"].record.outputs["report"]).stat().st_size > 10_000
    assert Path(tiled.outputs["quality"]).is_file()
    assert [planned.action for planned in plan(config, "evaluate")] == ["skip"] * 4
    _as_features_given(config, tmp_path / "out")

    others = features_config(tmp_path / "root", "embed.dtype=float32")
    assert [planned.action for planned in plan(others, "train")] == ["skip", "run", "unknown"]

    model, stored_config = load_model(Path(first.stages["train"].record.outputs["checkpoint"]))
    slide = load_cohort(config, needs_labels=True).slides[0]
    found = predict_slide(model, stored_config, slide)  # tiles and embeds it anew
    assert found.attention["attention"].to_numpy().sum() == pytest.approx(1, abs=1e-3)


def _as_features_given(config: Config, out: Path) -> None:
    """Own store, TRIDENT's layout, and back: the same numbers, from which a model is trained, tested and predicts."""
    export_features(config, "trident", str(out))
    plain = config.model_dump(mode="json")
    plain |= {"embed": None, "cohort": {"uri": config.cohort.uri, "features": str(out)}}
    given = Config.model_validate(plain)
    stages = run(given, "evaluate").stages
    assert {name: stage.outcome for name, stage in stages.items()} == dict.fromkeys(
        ("tile", "train", "evaluate"), "done"
    )
    own = open_sources(config, load_cohort(config, needs_labels=True).slides, finished(config, "tile").keys)
    back = open_sources(given, load_cohort(given, needs_labels=True).slides, stages["tile"].record.keys)
    for (_, ours), (_, theirs) in zip(own, back, strict=True):
        rows = np.arange(ours.n_patches)
        assert theirs.vectors(rows).tobytes() == ours.vectors(rows).tobytes()  # type: ignore[union-attr]
    assert 0 <= stages["evaluate"].record.metrics["test_auc"] <= 1
    assert Path(stages["evaluate"].record.outputs["report"]).stat().st_size > 10_000
    assert [planned.action for planned in plan(given, "evaluate")] == ["skip"] * 3
    checkpoint = stages["train"].record.outputs["checkpoint"]
    file = str(next(out.glob("*.h5")))
    found = predict(checkpoint, [file, "absent.h5"], None, out / "predicted", tracking_uri="unused")
    assert list(found["failed"]) == ["absent"]
    assert len(list((out / "predicted" / "slides").iterdir())) == 1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that threads wait for one another longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_best_5000_of_12000_features_are_those_that_training_takes(one_thread: None, tmp_path: Path) -> None:
    """The paper's M = I = 5000 where more patches than that are there: three chunks, of which the last is short."""
    config = small_config(
        tiling={"patch_px": 8, "mpp": None, "tissue": "none", "edge": "drop"},
        embed={"encoder": {"name": "resnet18", "stages": 2}},
        model={
            "encoder": {"name": "features", "features": 8, "dim": 16},
            "aggregator": {"heads": 2, "key_dim": 4, "hidden_dim": 16, "dropout": 0.0},
            "select": {"memory": 5000, "chunk": 5000},
        },
        train={"epochs": 2, "batch_size": 1, "lr": 1e-2, "explore_epochs": 0, "warmup_epochs": 0, "augment": False},
    )
    (cohort_slide,) = write_cohort(tmp_path, ["yes"]).slides
    Image.fromarray(tissue_rgb(967, 803)).save(cohort_slide.uri)
    ((_, stored),) = store_slides(Cohort("", (cohort_slide,)), tmp_path / "patches", config)
    assert stored.n_patches == 12_000
    vectors = np.random.default_rng(7).normal(size=(12_000, 8)).astype(np.float32)
    written = FeatureStore(str(tmp_path), "spec", "encoder").write(stored, np.array_split(vectors, 7), {})
    bag = FeatureBag([written])
    torch.manual_seed(0)
    model = build_model(config)
    before = best_rows(model, vectors, 5000)
    selection = select(model, [bag], 5000, 5000)
    assert set(selection.index[0].tolist()) == before
    assert (selection.scores[0].diff() <= 0).all()
    assert gather([bag], selection, "cpu").patches[0].numpy().tolist() == vectors[selection.index[0]].tolist()

    slides = Slides([len(bag)], [{"tumour": 1.0}], {"tumour": "binary"}, lambda _index, _epoch: bag)
    optimizer = build_optimizer(model, config.train)
    options: dict[str, Any] = {"seed": 0, "start_epoch": 0, "ranks": Ranks()}
    for done in train_steps(model, optimizer, slides, config.train, config.model.select, **options):
        assert set(done.chosen[0].tolist()) == before  # by the weights as they were before the step
        before = best_rows(model, vectors, 5000)
    assert done.step == 2
    assert before != set(selection.index[0].tolist())  # it has learnt


def best_rows(model: IPSModel, vectors: np.ndarray, memory: int) -> set[int]:
    """Directly: the scores of all patches at once, in float64."""
    model = copy.deepcopy(model).double().eval()
    aggregator = model.aggregator
    assert isinstance(aggregator, Aggregator)
    attention = aggregator.attention
    with torch.no_grad():
        keys = attention.key_proj(model.embed(torch.from_numpy(vectors).double()))
        queries = attention.query_proj(attention.queries)
        heads = [
            queries[:, start : start + attention.key_dim] @ keys[:, start : start + attention.key_dim].T
            for start in range(0, attention.heads * attention.key_dim, attention.key_dim)
        ]
        scores = (torch.cat(heads) / attention.key_dim**0.5).softmax(dim=1).mean(dim=0)
    return set(scores.topk(memory).indices.tolist())
