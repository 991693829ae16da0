"""Feature files of TRIDENT, CLAM and STAMP, made the way their code makes them, and what is wrong with bad ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pipeline.errors import SlideError
from pipeline.formats.feature_files import clam_h5, clam_pt, read_features, stamp_h5, trident_h5, usual_step

N, D = 37, 11
VECTORS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float16)
CORNERS = np.stack([np.arange(N) % 7, np.arange(N) // 7], axis=1) * 1024 + 13
TRIDENT = {
    "patch_size": 512, "patch_size_level0": 1024, "level0_magnification": 40, "target_magnification": 20, "overlap": 0,
    "name": "a b", "savetodir": "out", "level0_width": 100_001, "level0_height": 90_001,
}  # fmt: skip
STAMP = {
    "stamp_version": "2.5.0", "extractor": "uni2-1f0c46d2", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224,
    "code_hash": "0", "feat_type": "tile",
}  # fmt: skip


def h5(write: Callable[[h5py.File], None]) -> bytes:
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        write(file)
    return sink.getvalue()


def growing(file: h5py.File, key: str, array: np.ndarray, chunk: int, **attributes: object) -> None:
    """As `save_h5` (TRIDENT) and `save_hdf5` (CLAM): with chunks of 1 and 32 rows."""
    shape = array.shape
    made = file.create_dataset(
        key, shape=shape, maxshape=(None, *shape[1:]), chunks=(chunk, *shape[1:]), dtype=array.dtype
    )
    made[:] = array
    made.attrs.update(attributes)


def trident(
    vectors: np.ndarray = VECTORS, corners: np.ndarray = CORNERS, key: str = "features", **changes: object
) -> bytes:
    def write(file: h5py.File) -> None:
        growing(file, key, vectors, 1, name="a b", savetodir="out", encoder="uni_v2")
        growing(file, "coords", corners, 1, **{**TRIDENT, **changes})

    return h5(write)


def clam(vectors: np.ndarray = VECTORS, corners: np.ndarray = CORNERS) -> bytes:
    """Batch by batch, as `compute_w_loader` appends them, in float32."""
    vectors, corners = vectors.astype(np.float32), corners.astype(np.int32)

    def write(file: h5py.File) -> None:
        growing(file, "features", vectors[:16], 32)
        growing(file, "coords", corners[:16], 32)
        for name, array in {"features": vectors, "coords": corners}.items():
            file[name].resize(len(array), axis=0)
            file[name][16:] = array[16:]

    return h5(write)


def stamp(vectors: np.ndarray = VECTORS, corners: np.ndarray = CORNERS / 4, **changes: object) -> bytes:
    def write(file: h5py.File) -> None:
        file["coords"], file["feats"] = corners, vectors
        file.attrs.update({name: value for name, value in {**STAMP, **changes}.items() if value is not None})

    return h5(write)


def saved(found: object) -> bytes:
    sink = io.BytesIO()
    torch.save(found, sink)
    return sink.getvalue()


def vectors_at(data: bytes, offsets: np.ndarray, dtype: str, dim: int) -> np.ndarray:
    return np.stack([np.frombuffer(data, dtype, dim, start) for start in offsets.tolist()])


@pytest.mark.parametrize(
    ("data", "name", "layout", "encoder", "said"),
    [
        (trident(), "a.h5", "trident", "uni_v2", ("px", 1024, 1024, 512, 0.5, (100_001, 90_001))),
        (clam(), "a.h5", "clam", None, ("px", None, None, None, None, None)),
        (stamp(), "a.h5", "stamp", "uni2-1f0c46d2", ("um", 256, 256, 224, pytest.approx(256 / 224), None)),
        (saved(torch.from_numpy(VECTORS)), "a.pt", "pt", None, ("px", None, None, None, None, None)),
        (
            saved({"coords": torch.from_numpy(CORNERS), "feats": torch.from_numpy(VECTORS)}),
            "a.pt",
            "pt",
            None,
            ("px", None, None, None, None, None),
        ),
    ],
    ids=["trident", "clam", "stamp", "tensor", "tensors"],
)
def test_each_layout(data: bytes, name: str, layout: str, encoder: str | None, said: tuple[object, ...]) -> None:
    found = read_features(data, name)
    told = found.patches
    assert (found.layout, found.encoder, found.dim) == (layout, encoder, D)
    assert (told.unit, told.extent, told.step, told.patch_px, told.target_mpp, told.dimensions) == said
    assert np.array_equal(vectors_at(data, found.offsets, found.dtype, D), VECTORS)
    if told.corners is None:
        assert data == saved(torch.from_numpy(VECTORS))
    else:
        assert np.array_equal(told.corners * (4 if layout == "stamp" else 1), CORNERS)


def test_older_files_of_stamp() -> None:
    second = read_features(stamp(tile_size_um=None, tile_size_px=None, tile_size=256.0), "a.h5").patches
    assert (second.extent, second.patch_px, second.target_mpp) == (256, None, None)
    grid = np.stack([np.arange(N) % 7, np.arange(N) // 7], axis=1) * 224
    historic = stamp(corners=grid, tile_size_um=None, tile_size_px=None, unit=None, extractor=None, feat_type=None)
    first = read_features(historic, "a.h5").patches
    assert (first.extent, first.patch_px) == (256, 224)
    assert first.corners is not None
    assert np.array_equal(first.corners[:7, 0], np.arange(7) * 256)


def nan() -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[5, 3], vectors[9, 0] = np.nan, np.inf
    return vectors


def other(**arrays: np.ndarray) -> bytes:
    def write(file: h5py.File) -> None:
        for name, array in arrays.items():
            file[name] = array

    return h5(write)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (trident(key="feat"), r"neither `features` nor `feats` is in it, but `coords` \(37, 2\), `feat` \(37, 11\)"),
        (h5(lambda file: None), "but nothing; rename"),
        (trident(corners=CORNERS.T), r"`coords` is \(2, 37\): transposed; write it as \(37, 2\)"),
        (trident(corners=CORNERS[:-1]), "37 features and 36 coordinates: they are of two tilings; make both"),
        (trident(vectors=np.ascontiguousarray(VECTORS.T)), "11 features and 37 .* the features look transposed"),
        (trident(corners=CORNERS * 100), "lie beyond the slide of 100001 x 90001 px: they are of another slide"),
        (trident(level0_width=6100, level0_height=7200), "beyond the slide of 6100 x 7200 px: x and y are exchanged"),
        (trident(patch_size_level0=-1), "a patch of -1 level-0 px, -1 px apart, makes no sense"),
        (trident(vectors=nan()), "2 of 37 vectors, the first in row 5, hold NaN or infinity; extract them again"),
        (clam(vectors=nan()), "2 of 37 vectors, the first in row 5,"),
        (trident(vectors=VECTORS.astype(np.float64)), "`features` holds float64; convert it to float16 or float32"),
        (trident(vectors=VECTORS.astype(">f4")), "`features` is big-endian"),
        (trident(vectors=VECTORS[None]), r"has the shape \(1, 37, 11\), not \(patches, D\)"),
        (trident(corners=CORNERS * np.nan), "`coords` holds NaN"),
        (trident()[:-100], r"no whole HDF5 file \(.*truncated file.*its writer or its copy was stopped"),
        (b"text", "no whole HDF5 file"),
        (stamp(tile_size_um=None, unit=None), "no `tile_size_um` among its attributes .*extract it again"),
        (stamp(feat_type="slide"), "features are of a slide, not of tiles"),
        (
            h5(lambda file: file.create_dataset("features", data=VECTORS, compression="gzip") and None),
            r"a.h5: `features`: it is stored compressed \(gzip\); h5repack -f NONE IN OUT",
        ),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(data: bytes, problem: str) -> None:
    with pytest.raises(SlideError, match=problem) as caught:
        read_features(data, "a.h5")
    assert caught.value.reason == "features"


def test_files_without_patches_and_without_bytes() -> None:
    """TRIDENT writes shape (0,), or (0, D), where a slide has no tissue."""
    for empty in (np.empty((0, D), np.float32),):
        with pytest.raises(SlideError, match="found no patches") as caught:
            read_features(other(features=empty, coords=np.empty((0, 2))), "a.h5")
        assert caught.value.reason == "no-tissue"
    with pytest.raises(SlideError, match="zero bytes"):
        read_features(b"", "a.h5")


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"x": torch.zeros(3, 2)}, r"neither `features` nor `feats` is in it, but `x` \(3, 2\)"),
        ({"features": [1.0]}, "it holds a list, not a tensor"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "holds bfloat16; convert it"),
        (torch.zeros(3), r"has the shape \(3,\)"),
        (torch.arange(77.0).reshape(7, 11).T, "do not lie in the file as they are"),
        (io.BytesIO, "no tensor and was not run"),
    ],
)
def test_bad_tensors(found: object, problem: str) -> None:
    with pytest.raises(SlideError, match=problem):
        read_features(saved(found), "a.pt")
    with pytest.raises(SlideError, match="damaged"):
        read_features(b"not a tensor", "a.pt")


def test_the_usual_distance_of_neighbours() -> None:
    assert usual_step(CORNERS.astype(np.float64)) == 1024
    assert usual_step(np.array([[0.0, 0.0], [5.0, 3.0]])) is None
    assert usual_step(np.array([[0.0, 0.0], [0.0, 3.0], [7.0, 3.0]])) == 3
    shifted = np.array([[0.0, 0.0], [8.0, 0.0], [16.0, 0.0], [17.0, 0.0]])
    assert usual_step(shifted) == 8


def test_what_is_written_has_the_tools_layouts() -> None:
    """Chunks, kinds and attributes as the tools' own files have them."""

    def look(data: bytes) -> Mapping[str, Any]:
        with h5py.File(io.BytesIO(data)) as file:
            sets = {name: (one.shape, one.chunks, one.maxshape, dict(one.attrs)) for name, one in file.items()}
            return {**sets, "file": dict(file.attrs)}

    about = {"name": "a b", "savetodir": "out", "encoder": "uni_v2"}
    assert look(trident_h5(VECTORS, CORNERS, TRIDENT, about)) == look(trident())
    assert look(clam_h5(VECTORS.astype(np.float32), CORNERS)) == look(clam())
    ours = look(stamp_h5(VECTORS, CORNERS, 0.25, 1024.0, 224, "uni2-1f0c46d2"))
    theirs = look(stamp())
    assert {**theirs, "file": None} == {**ours, "file": None}
    assert ours["file"].items() <= theirs["file"].items()
    assert torch.equal(torch.load(io.BytesIO(clam_pt(VECTORS)), weights_only=True), torch.from_numpy(VECTORS))
