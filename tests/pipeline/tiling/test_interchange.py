"""Patch coordinates of TRIDENT and CLAM, against files made the way their code makes them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Level
from pipeline.tiling.grid import plan_grid
from pipeline.tiling.interchange import (
    StoredGrid,
    Tool,
    coordinates_h5,
    file_name,
    file_names,
    file_stems,
    read_coordinates,
)

CORNERS = np.array([[0, 0], [1024, 0], [512, 3072], [99_328, 80_001]])


def saved(coords: np.ndarray, attributes: Mapping[str, Any], chunk: int) -> bytes:
    """What `save_h5` (TRIDENT) and `save_hdf5` (CLAM) both do, with their chunks of 1 and 32 rows."""
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        dataset = file.create_dataset(
            "coords", shape=coords.shape, maxshape=(None, *coords.shape[1:]), chunks=(chunk, 2), dtype=coords.dtype
        )
        dataset[:] = coords
        for key, value in attributes.items():
            dataset.attrs[key] = value
    return sink.getvalue()


def trident(coords: np.ndarray = CORNERS, **changes: object) -> bytes:
    """`trident.IO.coords_to_h5`: 512 px at 20x from a 40x slide, 64 px overlapping."""
    attributes = {
        "patch_size": 512,
        "patch_size_level0": 512 * 40 // 20,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 64,
        "name": "a b",
        "savetodir": "out/20x_512px_64px_overlap",
        "level0_width": 100_001,
        "level0_height": 90_001,
        **changes,
    }
    return saved(np.asarray(coords, dtype=np.int64), attributes, 1)


def clam(coords: np.ndarray = CORNERS, **changes: object) -> bytes:
    """CLAM's `process_contour` and `save_hdf5`: 256 px of level 1, which is four times smaller."""
    attributes = {
        "patch_size": 256,
        "patch_level": 1,
        "downsample": (4.000106, 4.0),  # a list of tuples in CLAM; width by width, height by height
        "downsampled_level_dim": tuple(np.array((25_000, 22_500))),
        "level_dim": (25_000, 22_500),
        "name": "a b",
        "save_path": "RESULTS/patches",
        **changes,
    }
    return saved(coords, attributes, 32)


def test_trident() -> None:
    found = read_coordinates(trident(), "a.h5")
    assert (found.tool, found.extent, found.step) == ("trident", 1024, 1024 - 128)
    assert found.corners.dtype == np.int64
    assert found.corners.tolist() == CORNERS.tolist()


def test_clam() -> None:
    found = read_coordinates(clam(CORNERS.astype(np.int32)), "a.h5")
    assert found.tool == "clam"
    assert found.extent == pytest.approx(1024, rel=1e-4)
    assert found.corners.tolist() == CORNERS.tolist()


def test_files_written_before_trident_kept_the_slides_size() -> None:
    with h5py.File(io.BytesIO(trident()), "r+") as file:
        del file["coords"].attrs["level0_width"], file["coords"].attrs["level0_height"]
        file.flush()
        data = file.id.get_file_image()
    assert read_coordinates(data, "a.h5").extent == 1024


def stored(**changes: object) -> StoredGrid:
    values: dict[str, Any] = {
        "name": "a b", "corners": CORNERS, "patch_px": 256, "extent": 1024.0, "overlap_px": 0, "level": 1,
        "read_px": 256, "level_size": (25_000, 22_500), "level_downsample": 4.0, "dimensions": (100_001, 90_001),
        "mpp": 0.25,
    }  # fmt: skip
    return StoredGrid(**{**values, **changes})


@pytest.mark.parametrize("tool", ["trident", "clam"])
def test_what_we_write_is_what_the_tool_writes(tool: Tool) -> None:
    grid = stored(patch_px=512, overlap_px=64) if tool == "trident" else stored()
    folder = {"trident": "out/20x_512px_64px_overlap", "clam": "RESULTS/patches"}[tool]
    ours, theirs = coordinates_h5(grid, tool, folder, 0.5), {"trident": trident, "clam": clam}[tool]()
    with h5py.File(io.BytesIO(ours)) as ours_h5, h5py.File(io.BytesIO(theirs)) as theirs_h5:
        a, b = ours_h5["coords"], theirs_h5["coords"]
        assert list(ours_h5) == list(theirs_h5) == ["coords"]
        assert (a.dtype, a.shape, a.maxshape, a.chunks) == (b.dtype, b.shape, b.maxshape, b.chunks)
        assert (a[:] == b[:]).all()
        assert {key: type(value) for key, value in a.attrs.items()} == {k: type(v) for k, v in b.attrs.items()}
        assert set(a.attrs) == set(b.attrs)
        for key in set(a.attrs) - {"downsample"}:
            assert np.array_equal(a.attrs[key], b.attrs[key]), key
    again = read_coordinates(ours, "a.h5")
    assert (again.tool, again.corners.tolist()) == (tool, CORNERS.tolist())


@pytest.mark.parametrize(
    ("mpp", "target", "whole"),
    [
        (0.25, 0.5, True),
        (0.2431, 0.25, True),  # read as it is, so TRIDENT must do so too
        (0.24, 0.25, True),
        (0.499, 0.5, True),
        (0.5, 0.75, False),  # 13.3x
        (0.25, 8.0, False),  # 1.25x
        (0.2325, 0.5, False),
        (0.2527, 0.5, False),
        (0.263, 0.5, False),
        (0.4843, 1.0, False),
    ],
)
@pytest.mark.parametrize("patch_px", [224, 256])
def test_trident_reads_the_patches_that_we_cut(mpp: float, target: float, patch_px: int, *, whole: bool) -> None:
    """`WSIPatcher` goes by the magnifications alone."""
    levels = (Level(100_001, 90_001, 1.0), Level(25_000, 22_500, 4.0001))
    grid = plan_grid(levels, TilingConfig(mpp=target, patch_px=patch_px), mpp)
    data = coordinates_h5(stored(mpp=mpp, extent=grid.extent, patch_px=patch_px), "trident", "out", target)
    with h5py.File(io.BytesIO(data)) as file:
        attributes = dict(file["coords"].attrs)
    level0, wanted = attributes["level0_magnification"], attributes["target_magnification"]
    read = round(attributes["patch_size"] * ((10 / wanted) / (10 / level0)))
    assert read == attributes["patch_size_level0"] == round(grid.extent)
    assert wanted == pytest.approx(10 / target)
    assert level0 == pytest.approx(10 / mpp, rel=0.06)
    if patch_px == 256:
        assert (isinstance(level0, np.integer) and isinstance(wanted, np.integer)) == whole


def test_without_microns_there_is_no_magnification_to_name() -> None:
    with pytest.raises(SlideError, match="export for CLAM"):
        coordinates_h5(stored(mpp=None), "trident", "out", None)
    assert read_coordinates(coordinates_h5(stored(mpp=None), "clam", "out", None), "a").tool == "clam"


IDS = [
    "a",
    "A",
    "x/y",
    "x\\y",
    "x_y",
    "..",
    "",
    "a b.svs",
    "é",
    "e\u0301",
    "-.",
    "a\nb",
    *("肝臓" * 90 + end for end in "ab"),
]


def test_names_of_files_can_be_names_and_differ(tmp_path: Path) -> None:
    names = file_stems(IDS)
    assert {slide_id for slide_id in IDS if names[slide_id] == slide_id} == {"a", "x_y", "a b.svs", "é"}
    for stem in names.values():
        (tmp_path / f"{stem}_patches.h5").touch()  # the longest of the suffixes
    assert len({stem.casefold() for stem in names.values()}) == len(IDS) == len(list(tmp_path.iterdir()))


@settings(max_examples=40)
@given(st.text(), st.text(), st.sampled_from(["trident", "clam"]))
def test_whatever_a_file_is_called_by_it_is_looked_for(one: str, other: str, tool: Tool) -> None:
    for slide_id, stem in file_stems([one, other]).items():
        assert file_name(tool, stem) in file_names(slide_id, "file")
        assert file_name(tool, "file") in file_names(slide_id, "file")
    assert all(len(name.encode()) <= 255 and "/" not in name for name in file_names(one, other))


def test_names_of_the_files() -> None:
    assert (file_name("trident", "a.b"), file_name("clam", "a.b")) == ("a.b_patches.h5", "a.b.h5")


def other(coords: object) -> bytes:
    """A file whose `coords` is no table: a group, or one value."""
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        if coords == "group":
            file.create_group("coords")
        else:
            file.create_dataset("coords", data=coords)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no HDF5", "no HDF5 file"),
        (trident()[:700], "no HDF5 file"),
        (trident().replace(b"TREE", b"TREX"), "no HDF5 file .*; give TRIDENT's or CLAM's file"),
        (other("group"), "no HDF5 file with a dataset `coords`"),
        (other(3), "no HDF5 file with a dataset `coords`"),
        (other("text"), "no HDF5 file with a dataset `coords`"),
        (other(h5py.Empty("i8")), "no HDF5 file with a dataset `coords`"),
        (trident(patch_size=0), "neither TRIDENT's nor CLAM's .*; patch it again"),
        (trident(patch_size_level0=0), "makes no sense"),
        (trident(overlap=512), "makes no sense"),
        (saved(CORNERS, {"patch_size": 256}, 1), "neither TRIDENT's nor CLAM's"),
        (saved(CORNERS / 2, {"patch_size": 256}, 1), "not integers"),
    ],
)
def test_another_file_says_so(data: bytes, said: str) -> None:
    with pytest.raises(SlideError, match=said) as caught:
        read_coordinates(data, "a.h5")
    assert caught.value.reason == "coords"
