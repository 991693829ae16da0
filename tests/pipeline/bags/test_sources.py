from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ips.bag import Bag
from ips.selection.transfer import arrived
from pipeline.bags.augment import Augment
from pipeline.bags.images import cohort_csv
from pipeline.bags.sources import LabelledSource, content_of, contents, image_statuses, open_bag, open_sources
from pipeline.bags.unseen import tiled
from pipeline.cohort.table import read_cohort
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import SlideError
from pipeline.inference.prediction import load_model
from pipeline.model.build import build_model
from pipeline.model.folder import save_model
from pipeline.predictions.run import predict
from pipeline.results.evaluate import evaluate
from pipeline.results.report import render_report
from pipeline.workflow.run import plan, run
from tests.pipeline.digits import write_digits
from tests.pipeline.small import pack_slides, small_config, store_slides, write_cohort

CONF = Path(__file__).resolve().parents[3] / "conf"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def _config(root: Path, digits: Path, *overrides: str) -> Config:
    small = [
        f"storage.root={root}",
        f"cohort.megapixel_mnist.folder={digits}",
        *(f"cohort.megapixel_mnist.{setting}" for setting in ("train=9", "test=8", "width=141", "height=190")),
        "cohort.megapixel_mnist.strokes=3",
        "model.aggregator.hidden_dim=16",
        "model.select.memory=4",
        "evaluate.bootstrap=20",
        "train.epochs=2",
        "train.warmup_epochs=1",
    ]
    return load_config("megapixel_mnist", [*small, *overrides], CONF)


def _sources(config: Config) -> Sequence[LabelledSource]:
    images = config.cohort.megapixel_mnist
    assert images is not None
    uri = Path(config.cohort.uri)
    uri.parent.mkdir(parents=True, exist_ok=True)
    uri.write_bytes(cohort_csv(images))
    slides = read_cohort(config.cohort.uri, config.tasks).slides
    keys = {status.slide_id: str(status.key) for status in image_statuses(config, slides)}
    return open_sources(config, slides, keys)


def _whole(bag: Bag) -> torch.Tensor:
    return torch.cat([arrived(chunk, torch.device("cpu")) for chunk in bag.chunks(5)])


def test_both_kinds_open_a_bag_of_as_many_patches_as_they_say(tmp_path: Path, digits: Path) -> None:
    config = small_config()
    slides = store_slides(write_cohort(tmp_path, ("no",)), tmp_path / "store", config)
    images = _sources(_config(tmp_path / "mm", digits))
    for _, source in (slides[0], images[0]):
        bag = open_bag(source, threads=2, augment=None)
        assert len(bag) == source.n_patches == len(source.index().x)
        whole = _whole(bag)
        assert len(whole) == source.n_patches
        rows = torch.tensor([2, 0])
        assert torch.equal(bag.take(rows).patches, whole[rows])
        assert len(source.payloads(rows.numpy())) == 2
        assert source.n_bad_tiles == 0
    turned = _whole(open_bag(slides[0][1], threads=1, augment=Augment(0, 0, slides[0][1].key)))
    assert not torch.equal(turned, _whole(open_bag(slides[0][1], threads=1, augment=None)))


def test_the_tile_stage_lists_images_and_names_rows_that_are_none(tmp_path: Path, digits: Path) -> None:
    config = _config(tmp_path, digits)
    slides = [slide for slide, _ in _sources(config)]
    statuses = image_statuses(config, [*slides, replace(slides[0], slide_id="odd", uri=f"{digits}#train-9")])
    assert [status.status for status in statuses] == ["committed"] * 17 + ["quarantined"]
    assert {status.n_patches for status in statuses[:-1]} == {2 * 3}
    assert len({status.key for status in statuses}) == 18
    assert "the set has images train-0 to train-8" in str(statuses[-1].reason)


def test_a_slide_is_tiled_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    (slide,) = write_cohort(tmp_path, ("no",)).slides
    with tiled(small_config(), slide) as (source, _):
        folder = Path(source.uri)  # type: ignore[union-attr]
        assert len(open_bag(source, threads=1, augment=None)) == source.n_patches > 0
        assert folder.is_dir()
    assert not folder.exists()
    gone = replace(slide, uri=str(tmp_path / "gone.png"))
    with pytest.raises(SlideError, match=r"gone\.png") as caught, tiled(small_config(), gone):
        pass
    assert caught.value.reason == "missing"


def test_a_slide_in_a_pack_has_the_content_that_it_has_in_a_folder(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, ("no", "yes", "no"))
    folders = [source for _, source in store_slides(cohort, tmp_path / "folders", small_config())]
    packed = [source for _, source in pack_slides(cohort, tmp_path / "packs", small_config())]
    assert {source.uri for source in packed} == {packed[0].uri}
    written = [json.loads((Path(source.uri) / "slide.json").read_text())["content"] for source in folders]
    assert [content_of(source) for source in packed] == [content_of(source) for source in folders] == written
    assert len({*written, *(source.key for source in folders)}) == 6
    for kind, sources in (("folders", folders), ("packs", packed)):
        config = small_config(storage={"root": str(tmp_path), "patches": str(tmp_path / kind)})
        keys = {source.key for source in sources[1:]}
        assert contents(config, iter(sources[1:])) == {*written[1:], *keys}


def test_images_are_evaluated_shown_and_predicted_like_slides(tmp_path: Path, digits: Path) -> None:
    kinds = {"majority": "multiclass", "multi": "multilabel"}
    tasks = [{"name": t, "column": t, "kind": k, "classes": list("0123456789")} for t, k in kinds.items()]
    config = _config(tmp_path, digits, "cohort.megapixel_mnist.test=3", f"tasks={tasks}")
    torch.manual_seed(1)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", build_model(config).state_dict(), config)
    model, config = load_model(tmp_path / "model")
    sources = [pair for pair in _sources(config) if pair[0].split == "test"]

    result = evaluate(model, config, sources)
    assert {"test_auc_majority", "test_auc_multi"} <= set(result.metrics)
    assert result.predictions.num_rows == 3
    assert [found.attention.shape for found in result.found] == [(6,)] * 3
    page = render_report(result, config, read_cohort(config.cohort.uri, config.tasks), {})
    assert page.count("data:image/jpeg") == 2 * 3 * 6

    shown = predict(str(tmp_path / "model"), [f"{digits}#test-2"], None, tmp_path / "out", tracking_uri="")
    assert shown["failed"] == {}
    row = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()[0]
    assert row["multi_7"] == pytest.approx(float(result.found[2].values["multi"][7]), abs=1e-5)
    assert len(list((tmp_path / "out" / "slides").iterdir())) == 1


@pytest.mark.slow
def test_the_cohort_follows_the_settings(tmp_path: Path, digits: Path, mlflow_uri: str) -> None:
    def config(*overrides: str) -> Config:
        return _config(tmp_path, digits, f"tracking.uri={mlflow_uri}", *overrides)

    assert [(p.stage, p.action) for p in plan(config(), "tile")] == [("megapixel_mnist", "run"), ("tile", "unknown")]
    first = run(config(), "tile")  # starts no Ray
    assert first.stages["tile"].record.metrics == {
        "slides": 17,
        "slides_quarantined": 0,
        "patches": 102,
        "bad_tiles": 0,
    }
    assert [(p.stage, p.action) for p in plan(config(), "tile")] == [("tile", "skip")]
    more = config("cohort.megapixel_mnist.test=9")
    assert plan(more, "tile")[0].why.endswith("is not that of cohort.megapixel_mnist")
    assert run(more, "tile").stages["tile"].record.metrics["slides"] == 18
    overlapping = config("cohort.megapixel_mnist.test=9", "tiling.overlap_px=25")
    assert [p.why for p in plan(overlapping, "tile")] == ["changed since the last time: grid"]


@pytest.mark.slow
@pytest.mark.ray
def test_generated_images_go_all_the_way(ray_session: None, tmp_path: Path, digits: Path) -> None:
    config = _config(tmp_path, digits)
    result = run(config)
    assert {name: stage.outcome for name, stage in result.stages.items()} == dict.fromkeys(
        ("tile", "train", "evaluate", "register"), "done"
    )
    facts = result.stages["train"].record.facts
    assert (facts["train_slides"], facts["val_slides"], len(facts["learned"]["keys"])) == (9, 0, 9)
    assert 0 <= result.stages["evaluate"].record.metrics["test_auc_top"] <= 1
    champion, uri = "models:/megapixel_mnist@champion", str(config.tracking.uri)
    shown = predict(champion, [], config.cohort.uri, tmp_path / "out", tracking_uri=uri)
    assert (shown["slides"], shown["failed"]) == (17, {})
    assert run(config).outcome == "nothing to do"
    assert not list(tmp_path.rglob("*.arrow"))  # no patch was ever stored
