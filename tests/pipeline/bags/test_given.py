from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bags.feature_bag import FeatureBag
from pipeline.bags.given import GivenSlide, check_alike, open_given
from pipeline.bags.sources import content_of, open_bag, open_sources, patch_store
from pipeline.columnar import Columnar
from pipeline.config.recipe import Config
from pipeline.errors import DamagedError, SlideError, StageError
from pipeline.inference.prediction import predict_slide
from pipeline.ingest.cohorts import listed
from pipeline.ingest.features import index_cohort
from pipeline.ingest.versions import look_at
from pipeline.model.build import build_model
from tests.pipeline.formats.test_feature_files import VECTORS, D, N, clam, saved, stamp, trident
from tests.pipeline.ingest.test_cohorts import given_config
from tests.pipeline.test_columnar import through_ray
from tests.pipeline.tiled import row


def opened(config: Config, paths: list[Path]) -> list[GivenSlide]:
    slides, store = [row(path) for path in paths], patch_store(config)
    statuses = index_cohort(slides, config.tiling, store.uri.rpartition("/")[0], on_status=lambda _: None)
    keys = {status.slide_id: str(status.key) for status in statuses}
    found = [source for _, source in open_sources(config, slides, keys)]
    assert all(isinstance(one, GivenSlide) for one in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.h5", trident), ("a.h5", clam), ("a.h5", stamp), ("a.pt", lambda: saved(torch.from_numpy(VECTORS)))],
    ids=["trident", "clam", "stamp", "tensor"],
)
def test_a_bag_of_each_layout_gives_its_numbers(tmp_path: Path, name: str, write: Callable[[], bytes]) -> None:
    (tmp_path / name).write_bytes(write())
    config = given_config(tmp_path)
    if write is stamp:
        config = given_config(tmp_path, tiling={"patch_px": 224, "mpp": 1.143})
    (slide,) = opened(config, [tmp_path / name])
    assert b"FeatureCollection" in slide.patches.outline()
    bag = open_bag(slide, threads=1, augment=None)
    assert isinstance(bag, FeatureBag)
    assert len(bag) == N
    whole = torch.cat([chunk.patches for chunk in bag.chunks(8)]).numpy()
    assert np.array_equal(whole, VECTORS)
    assert whole.dtype == (np.float32 if write is clam else np.float16)
    rows = torch.tensor([36, 3, 3, 0])
    assert np.array_equal(bag.take(rows).patches.numpy(), VECTORS[rows.numpy()])
    assert [data[:2] for data in slide.payloads(np.array([2, 5]))] == [b"\xff\xd8"] * 2
    assert slide.thumbnail()[:2] == b"\xff\xd8"
    assert content_of(slide) != slide.key


def test_files_travel_as_columns(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.h5").write_bytes(trident())
    (tmp_path / "cohort.csv").write_text("slide_id,uri,features\na,,a.h5\nb,,b.h5\n")
    config = given_config(tmp_path)
    slides, store = listed(config).slides, patch_store(config)
    statuses = index_cohort(slides, config.tiling, store.uri.rpartition("/")[0], on_status=lambda _: None)
    keys = {status.slide_id: str(status.key) for status in statuses}
    found = open_sources(config, slides, keys)
    assert isinstance(found, Columnar)
    assert list(through_ray(found)) == open_sources(config, list(slides), keys)
    assert [Path(source.uri).name for _, source in found if isinstance(source, GivenSlide)] == ["a.h5", "b.h5"]


def test_a_model_predicts_a_file_that_no_stage_has_seen(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(trident())
    config = given_config(tmp_path)
    torch.manual_seed(0)
    found = predict_slide(build_model(config), config, row(tmp_path / "a.h5"))
    assert found.attention["attention"].to_numpy().sum() == pytest.approx(1, abs=1e-5)
    assert (found.mpp, found.extent) == (0.25, 1024)
    (tmp_path / "half.h5").write_bytes(trident()[:-900])
    with pytest.raises(SlideError, match="no whole HDF5 file"):
        predict_slide(build_model(config), config, row(tmp_path / "half.h5"))
    narrow = given_config(tmp_path, model={"encoder": {"name": "features", "features": 7}})
    with pytest.raises(SlideError, match=rf"those of .*a.h5 have {D}; set model.encoder.features={D}"):
        predict_slide(build_model(narrow), narrow, row(tmp_path / "a.h5"))


def test_a_file_that_was_replaced_is_not_read_by_its_old_index(tmp_path: Path) -> None:
    path, config = tmp_path / "a.h5", given_config(tmp_path)
    path.write_bytes(trident())
    (slide,) = opened(config, [path])
    path.write_bytes(trident(VECTORS * 2)[:-3])
    with pytest.raises(SlideError, match="replaced after it was indexed; run again") as caught:
        open_given([row(path)], look_at([row(path)], config.tiling), patch_store(config), [slide.key])
    assert caught.value.reason == "changed"
    path.write_bytes(b"short")
    with pytest.raises(DamagedError, match="truncated or was changed"):
        slide.vectors(np.arange(N))
    path.unlink()
    with pytest.raises(SlideError, match="does not exist"):
        open_given([row(path)], look_at([row(path)], config.tiling), patch_store(config), [slide.key])


def test_encoders_are_not_mixed(tmp_path: Path) -> None:
    files = {"a": trident(), "b": trident(VECTORS + 1), "c": clam(), "d": trident(np.concatenate([VECTORS] * 2, 1))}
    for name, data in files.items():
        (tmp_path / f"{name}.h5").write_bytes(data)
    config = given_config(tmp_path)
    slides, store = [row(tmp_path / f"{name}.h5") for name in files], patch_store(config)
    statuses = index_cohort(slides, config.tiling, store.uri.rpartition("/")[0], on_status=lambda _: None)
    keys = [str(status.key) for status in statuses]
    check_alike(store, keys[:2])
    with pytest.raises(StageError, match="1 files of 11 x float16 by uni_v2; 1 files of 11 x float32 by an encoder"):
        check_alike(store, [keys[0], keys[2]])
    with pytest.raises(StageError, match=r"2 files of 11 x float16 by uni_v2; 1 files of 22 .*; keep those of one"):
        check_alike(store, [keys[3], *keys[:2]])


def test_the_mpp_of_the_cohort_is_that_of_the_slide(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(clam())
    config = given_config(tmp_path)
    slide, store = replace(row(tmp_path / "a.h5"), mpp=0.31), patch_store(config)
    (status,) = index_cohort([slide], config.tiling, store.uri.rpartition("/")[0], on_status=lambda _: None)
    assert store.slide(str(status.key)).mpp == 0.31
