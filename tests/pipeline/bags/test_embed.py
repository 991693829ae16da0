"""Patches to features: an oracle, weights, resumption, and Ray Data's actors."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.bags.embed import (
    EmbeddedBag,
    Embedder,
    _together,
    embed_slide,
    embed_slides,
    embed_together,
    encoder_fingerprint,
)
from pipeline.bags.feature_bag import FeatureBag
from pipeline.bags.streamed import EmbeddedSlide
from pipeline.columnar import Columnar
from pipeline.config.embed import EmbedConfig
from pipeline.errors import StageError
from pipeline.model.build import build_encoder
from pipeline.store.features import FeatureStore
from pipeline.store.packs import Place
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.rows import features_row
from pipeline.store.verify import verify_store
from tests.pipeline.small import pack_slides, small_config, store_slides, write_cohort
from tests.pipeline.test_columnar import through_ray
from tests.pipeline.tiled import part_file


def settings(folder: Path, seed: int = 0, **changes: object) -> EmbedConfig:
    """A truncated ResNet-18 with seeded weights."""
    torch.manual_seed(seed)
    encoder, _ = build_encoder(EmbedConfig.model_validate({"encoder": {"name": "resnet18", "stages": 2}}).encoder)
    path = folder / f"weights-{seed}.pth"
    torch.save(encoder.state_dict(), path)
    plain = {"encoder": {"name": "resnet18", "stages": 2, "weights": str(path)}, "batch": 5}
    return EmbedConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[StoredSlide]:
    folder = tmp_path_factory.mktemp("embed")
    return [slide for _, slide in store_slides(write_cohort(folder, ["no", "yes"]), folder / "store", small_config())]


def test_features_are_the_networks_patch_by_patch(slides: list[StoredSlide], tmp_path: Path) -> None:
    config = settings(tmp_path, dtype="float32")
    store = FeatureStore(str(tmp_path / "features"), "spec", encoder_fingerprint(config))
    found = embed_slide(Embedder(config), slides[0], store, threads=1)
    encoder, dim = build_encoder(config.encoder)
    encoder.eval()
    for row in (0, 3, slides[0].n_patches - 1):
        pixels = np.asarray(Image.open(io.BytesIO(slides[0].payloads([row])[0])))
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
        scaled = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            wanted = encoder(scaled[None])[0].numpy()
        assert wanted.shape == (dim,)
        assert found.vectors(np.array([row]))[0] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_features_made_while_they_are_read_are_those_that_are_stored(slides: list[StoredSlide], tmp_path: Path) -> None:
    config = settings(tmp_path)
    store = FeatureStore(str(tmp_path / "features"), "spec", encoder_fingerprint(config))
    stored = [embed_slide(Embedder(config), slide, store, threads=1) for slide in slides]
    passing = [
        EmbeddedSlide(slide, slide, config, encoder_fingerprint(config), one.dim)
        for slide, one in zip(slides, stored, strict=True)
    ]
    assert [slide.key for slide in passing] == [slide.key for slide in stored]
    kept, made = FeatureBag(stored), EmbeddedBag(passing, threads=2)
    assert len(made) == len(kept)
    for size in (3, 5, 13, 99):
        for one, other in zip(kept.chunks(size), made.chunks(size), strict=True):
            assert torch.equal(one.patches, other.patches)
            assert torch.equal(one.index, other.index)
            assert one.positions is not None
            assert other.positions is not None
            assert torch.equal(one.positions, other.positions)
    rows = torch.tensor([21, 0, 8])
    assert torch.equal(made.take(rows).patches, kept.take(rows).patches)
    strip = torch.cat([chunk.index for chunk in made.strip(4, 3, 12)])
    assert strip.tolist() == list(range(3, 12))


def test_small_slides_have_the_same_features_in_one_pack(slides: list[StoredSlide], tmp_path: Path) -> None:
    config = settings(tmp_path)
    cohort = write_cohort(tmp_path, ["no", "yes"])
    packed = [slide for _, slide in pack_slides(cohort, tmp_path / "store", small_config())]
    assert [slide.place is not None for slide in packed] == [True, True]
    store = FeatureStore(str(tmp_path / "features"), "0" * 16, encoder_fingerprint(config))
    store.append(embed_together(Embedder(config), packed, store, threads=1))
    alone = FeatureStore(str(tmp_path / "alone"), "spec", encoder_fingerprint(config))
    held = PatchStore(str(tmp_path / "store"), small_config().tiling.fingerprint()).slides([s.key for s in packed])
    assert list(through_ray(store.slides(held))) == store.slides(packed)
    assert isinstance(store.slides(held), Columnar)
    for slide, other, found in zip(packed, slides, store.slides(packed), strict=True):
        assert slide.key == other.key
        one = embed_slide(Embedder(config), other, alone, threads=1)
        rows = np.arange(slide.n_patches)[::-2]
        assert (found.vectors(rows) == one.vectors(rows)).all()
        assert (found.positions(rows) == one.positions(rows)).all()
        assert found.payloads(rows[:2]) == one.payloads(rows[:2])
    assert len(list((tmp_path / "features").rglob("*.arrow"))) == 1
    verified = verify_store(str(tmp_path / "features"), 1, lambda *_: None)
    assert verified.damage + verified.leftovers == []
    assert verified.slides == 2
    kept = store.slides(packed)[1].vectors(np.arange(3))
    store.take_out([packed[0].key])
    assert store.gone([slide.key for slide in packed]) == [packed[0].key]
    assert (store.slides(packed[1:])[0].vectors(np.arange(3)) == kept).all()


def test_small_slides_go_together() -> None:
    def slide(number: int, patches: int, *, packed: bool) -> StoredSlide:
        place = Place(0, 0, 0, 0, 0, 0, 0, 0, 0) if packed else None
        return StoredSlide("", str(number), patches, 0, 32, 0, 1.0, 32.0, None, (9, 9), 1.0, False, place)

    slides = [slide(0, 5000, packed=False), *(slide(number, 900, packed=True) for number in range(1, 6))]
    groups = [[one.key for one in group] for group in _together(slides)]
    assert groups == [["0"], ["1", "2", "3"], ["4", "5"]]


def test_a_feature_is_the_same_in_any_company(tmp_path: Path) -> None:
    embedder = Embedder(settings(tmp_path, dtype="float32", batch=16))
    pixels = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = embedder(pixels)
    assert whole.dtype == np.float32
    assert (embedder(pixels[:3]) == whole[:3]).all()
    assert (embedder(pixels[7:8]) == whole[7:8]).all()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_feature_is_the_same_on_any_number_of_threads(compute: str, tmp_path: Path) -> None:
    """So `cluster.cpus_per_worker` may say how many an actor computes with: a forward pass cuts no sum."""
    embedder = Embedder(settings(tmp_path, dtype="float32", batch=16, compute_dtype=compute))
    pixels = torch.randint(0, 256, (16, 3, 67, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append(embedder(pixels))
    torch.set_num_threads(threads)
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    embedder = Embedder(config)
    with torch.no_grad():
        embedder._encoder.bn1.weight.mul_(1e9)
    with pytest.raises(StageError, match="embed.dtype=float32"):
        embedder(torch.full((1, 3, 32, 32), 200, dtype=torch.uint8))


def test_other_weights_are_another_store_and_another_place_is_not(tmp_path: Path) -> None:
    first, second = settings(tmp_path), settings(tmp_path, seed=1)
    assert encoder_fingerprint(first) != encoder_fingerprint(second)
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(str(first.encoder.weights)).read_bytes())
    trunk = first.encoder.model_copy(update={"weights": str(moved)})
    assert encoder_fingerprint(first.model_copy(update={"encoder": trunk})) == encoder_fingerprint(first)


@pytest.mark.ray
@pytest.mark.slow
def test_actors_make_what_is_missing(ray_session: None, slides: list[StoredSlide], tmp_path: Path) -> None:
    config = settings(tmp_path)
    store = FeatureStore(str(tmp_path / "features"), "spec", encoder_fingerprint(config))
    here = FeatureStore(str(tmp_path / "here"), "spec", encoder_fingerprint(config))
    done: list[str] = []
    embed_slide(Embedder(config), slides[0], store, threads=1)
    store.append(store.rows(slides[0].key))
    embed_slides(slides, config, store, actors=(1, 1), cpus=1.0, gpus=0.0, on_done=done.append)
    assert done == [slides[1].key]
    for slide in slides:
        rows = np.arange(slide.n_patches)
        alone = embed_slide(Embedder(config), slide, here, threads=1).vectors(rows).astype(float)
        assert store.slides([slide])[0].vectors(rows) == pytest.approx(alone, rel=1e-2, abs=1e-3)
    done.clear()
    embed_slides(slides, config, store, actors=(1, 1), cpus=1.0, gpus=0.0, on_done=done.append)
    assert done == []
    folder = store.slides([slides[0]])[0].uri
    while _said(store, slides[0]) != 1:  # ids are drawn: until the lowest is that of an earlier tiling
        store.append([features_row({"key": slides[0].key, "n_patches": 1, "dim": 2, "dtype": "float16"})])
    shutil.rmtree(folder)
    embed_slides(slides, config, store, actors=(1, 1), cpus=1.0, gpus=0.0, on_done=done.append)
    assert done == [slides[0].key]
    assert store.slides([slides[0]])[0].n_patches == slides[0].n_patches
    part = part_file(slides[0].uri)
    part.rename(tmp_path / "away")
    try:
        again = FeatureStore(str(tmp_path / "again"), "spec", encoder_fingerprint(config))
        with pytest.raises(Exception, match=part.name) as caught:
            embed_slides(slides, config, again, actors=(1, 1), cpus=1.0, gpus=0.0, on_done=done.append)
        assert type(caught.value).__name__ == "StorageError"
    finally:
        (tmp_path / "away").rename(part)


def _said(store: FeatureStore, slide: StoredSlide) -> int:
    """How many patches the catalogue's row for this slide speaks of."""
    patches: int = store.view.slides.take(store.view.slide_places([slide.key]))["n_patches"][0].as_py()
    return patches


def test_of_patches_with_surroundings_both_vectors_are_kept(tmp_path: Path) -> None:
    config = settings(tmp_path, dtype="float32")
    embedder = Embedder(config)
    pixels = torch.randint(0, 256, (7, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, dim = embedder(pixels), embedder.dim
    assert found.shape == (7, 2 * dim)
    for part, half in enumerate((pixels[:, :, :32], pixels[:, :, 32:])):
        assert found[:, part * dim : (part + 1) * dim] == pytest.approx(embedder(half), rel=1e-4, abs=1e-5)
    assert np.array_equal(found[3:], embedder(pixels[3:]))
