"""A slide scored in shards has the folder that it has when one process scores it, byte by byte."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Config
from pipeline.inference.shards import Cut, Joined
from pipeline.ingest.tiler import store_slide
from pipeline.predictions import large
from pipeline.predictions import slide as slide_module
from pipeline.predictions.large import cut
from pipeline.predictions.output import Failure
from pipeline.predictions.slide import Job, Predicting, Predictor
from pipeline.store.patches import PatchStore
from tests.pipeline.bags.test_embed import settings
from tests.pipeline.small import small_config, write_model
from tests.pipeline.tiled import RGB, row, spoilt
from tests.synth import write_pyramid

SMALL = RGB[:211, :293].copy()
TILING = {"patch_px": 37, "mpp": None, "min_tissue": 0.4, "edge": "drop", "max_bad_tiles": 0.9}


def _job(path: Path) -> Job:
    return Job(row(path), "with --mpp", {"tumour": "yes"}, "identity")


def _config(**select: object) -> Config:
    plain = small_config()
    encoder, aggregator = plain.model.encoder.model_dump(), plain.model.aggregator.model_dump()
    selecting = {"memory": 5, "chunk": 7, **select}
    model = {"encoder": encoder, "aggregator": aggregator, "select": selecting}
    return small_config(tiling=TILING, model=model, train={"score_batch": 8})


def _asked(folder: Path, config: Config, **more: Any) -> Predicting:
    folder.mkdir()
    model = str(write_model(folder, config))
    return Predicting(
        model, "models:/m/1", "digest", str(folder / "out"), None, heads=True, all_patches=False, dicom=False, **more
    )


def _files(out: str) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def _in_shards(predictor: Predictor, jobs: list[Job]) -> Any:
    """As the pool does it, the last shard first."""
    found = predictor.work(jobs)
    assert isinstance(found, Cut)
    scores = [predictor.work(shard) for shard in reversed(found.parts)]
    return predictor.work(Joined(jobs, tuple(reversed(scores))))


@pytest.mark.parametrize(("context", "place"), [("none", "store"), ("all", "slide")])
def test_a_slide_in_shards_has_the_bytes_of_one_process(context: str, place: str, tmp_path: Path) -> None:
    config = _config(context=context)
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    store = None
    if place == "store":
        store = str(tmp_path / "store")
        store_slide(row(path), config.tiling, store)
    alone = replace(_asked(tmp_path / "m", config), store=store)
    (whole,) = Predictor(alone).predict([_job(path)])
    assert isinstance(whole, dict)
    split = replace(alone, out=str(tmp_path / "split"), shard_above=whole["n_patches"] - 1, shards=3)
    assert _in_shards(Predictor(split), [_job(path)]) == [whole]
    assert _files(split.out) == _files(alone.out)
    at_the_limit = Predictor(replace(split, shard_above=whole["n_patches"]))
    assert at_the_limit.work([_job(path)]) == [whole]


def test_features_are_made_of_a_shard_s_patches_alone(tmp_path: Path) -> None:
    """A batch of the network reaches over what are chunks of the selection."""
    model = {"encoder": {"name": "features", "features": 128}, "select": {"memory": 5, "chunk": 7, "context": "all"}}
    config = small_config(
        tiling=TILING,
        embed=settings(tmp_path),
        model={**small_config().model.model_dump(), **model},
        train={"augment": False, "score_batch": 8},
    )
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    alone = _asked(tmp_path / "m", config)
    (whole,) = Predictor(alone).predict([_job(path)])
    split = replace(alone, out=str(tmp_path / "split"), shard_above=1, shards=3)
    assert _in_shards(Predictor(split), [_job(path)]) == [whole]
    assert _files(split.out) == _files(alone.out)


def test_shards_begin_where_a_chunk_does(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    predictor = Predictor(_asked(tmp_path / "m", _config(context="all"), shard_above=1, shards=3))
    found = predictor.work([_job(path)])
    assert isinstance(found, Cut)
    assert [shard.start % 7 for shard in found.parts] == [0] * 3
    assert [shard.stop for shard in found.parts[:-1]] == [shard.start for shard in found.parts[1:]]


def test_a_patch_that_cannot_be_decoded_is_left_out_by_whoever_joins(tmp_path: Path) -> None:
    good = write_pyramid(tmp_path / "good.tiff", SMALL, levels=1)
    bad = spoilt("zeroed", good, tmp_path)
    alone = _asked(tmp_path / "m", _config())
    (whole,) = Predictor(alone).predict([_job(bad)])
    assert isinstance(whole, dict)
    assert whole["n_bad_tiles"] > 0
    split = replace(alone, out=str(tmp_path / "split"), shard_above=1, shards=3)
    assert _in_shards(Predictor(split), [_job(bad)]) == [whole]
    assert _files(split.out) == _files(alone.out)


def test_a_slide_that_was_replaced_gives_no_scores_of_its_rows(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    predictor = Predictor(_asked(tmp_path / "m", _config(), shard_above=1, shards=2))
    found = predictor.work([_job(path)])
    assert isinstance(found, Cut)
    kept = predictor.work(found.parts[0])
    write_pyramid(path, SMALL[:, ::-1].copy(), levels=1)
    assert predictor.work(found.parts[1]) is None
    assert predictor.work(replace(found.parts[1], key="other")) is None
    assert predictor.work(Joined([_job(path)], (kept, None))) == predictor.predict([_job(path)])


def test_what_cannot_be_split_is_predicted_by_one(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    found = Predictor(_asked(tmp_path / "m", _config(mode="window"), shard_above=1, shards=2)).work([_job(path)])
    assert isinstance(found, list)
    assert isinstance(found[0], dict)


def test_a_slide_of_which_each_shard_would_measure_all_patches_is_not_split(tmp_path: Path) -> None:
    config, path = _config(), write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    status = store_slide(row(path), config.tiling, str(tmp_path / "store"))
    whole = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint()).slide(str(status.key))
    assert cut(config, [row(path)], whole, 1, 2) is not None
    measured = config.model_copy(update={"tiling": config.tiling.model_copy(update={"min_sharpness": 0.0})})
    assert cut(measured, [row(path)], whole, 1, 2) is None


def test_a_slide_that_was_replaced_after_all_its_rows_were_scored_is_predicted_alone(tmp_path: Path) -> None:
    config = _config()
    config = config.model_copy(update={"tiling": config.tiling.model_copy(update={"tissue": "none"})})
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    predictor = Predictor(_asked(tmp_path / "m", config, shard_above=1, shards=2))
    found = predictor.work([_job(path)])
    assert isinstance(found, Cut)
    old = tuple(predictor.work(shard) for shard in found.parts)
    write_pyramid(path, SMALL[:, ::-1].copy(), levels=1)  # as many patches
    mixed = predictor.work(Joined([_job(path)], old))
    assert mixed == predictor.predict([_job(path)])


def test_what_goes_wrong_with_rows_costs_no_other_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins meets it too, where it is recorded as of any slide; what is the node's is raised."""
    path = write_pyramid(tmp_path / "a.tiff", SMALL, levels=1)
    predictor = Predictor(_asked(tmp_path / "m", _config(), shard_above=1, shards=2))
    found = predictor.work([_job(path)])
    assert isinstance(found, Cut)

    def failing(error: Exception, *_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(large, "strip_scores", partial(failing, ValueError("never seen before")))
        assert [predictor.work(shard) for shard in found.parts] == [None, None]
        patch.setattr(slide_module, "predict_bag", partial(failing, ValueError("never seen before")))
        joined = predictor.work(Joined([_job(path)], (None, None)))
        assert joined == [Failure("crash", "ValueError: never seen before")]
        patch.setattr(large, "strip_scores", partial(failing, MemoryError()))
        with pytest.raises(MemoryError):
            predictor.work(found.parts[0])
