"""Parametric Maps of DICOM slides, read back by highdicom and pydicom."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import ParametricMapStorage

from pipeline.errors import ConfigError, SlideError
from pipeline.predictions import dicom
from pipeline.predictions.dicom import load_highdicom, raster, write_maps
from pipeline.predictions.run import How, predict
from tests.dicom import uid, write_series
from tests.pipeline.small import small_config, write_model
from tests.synth import tissue_rgb, write_pyramid

WIDTH, HEIGHT, MPP = 877, 691, 0.2527
GENERATOR = np.random.default_rng(3)


def _facts(patch: float, count: int) -> dict[str, Any]:
    said = {"version": "effect/1", "unit": "log odds", "definition": ""}
    return {
        "uri": "a", "dimensions": [WIDTH, HEIGHT], "patch": patch, "n_patches": count,
        "model": {"source": "models:/sm\N{LATIN SMALL LETTER A WITH DIAERESIS}ll/3", "digest": "0123456789abcdef01"},
        "maps": {"attention": {**said, "unit": "share; sums to 1"}, "effect_tumour_yes": said},
    }  # fmt: skip


def _columns(patch: float) -> dict[str, np.ndarray]:
    """Patches side by side, whose corners are rounded, with numbers of which no two are equal."""
    x, y = (np.round(np.arange(0, edge - patch, patch)).astype(np.int64) for edge in (WIDTH, HEIGHT))
    places = np.array([(a, b) for b in y for a in x])
    attention = GENERATOR.permutation(np.arange(1, len(places) + 1)).astype(np.float32)
    effect = GENERATOR.standard_normal(len(places)).astype(np.float32)
    columns = {"x": places[:, 0], "y": places[:, 1], "attention": attention / attention.sum(), "score": attention}
    return columns | {"effect_tumour_yes": effect}


def test_a_px_has_the_mean_of_the_patches_that_its_centre_is_in() -> None:
    x, y, values = GENERATOR.integers(-9, 61, 40), GENERATOR.integers(0, 47, 40), GENERATOR.random(40)
    found = raster(x, y, values, 11.3, (17, 13), (3.7, 3.9))
    for row in range(13):
        for column in range(17):
            across, down = (column + 0.5) * 3.7, (row + 0.5) * 3.9
            inside = (x < across) & (across <= x + 11.3) & (y < down) & (down <= y + 11.3)
            expected = values[inside].mean() if inside.any() else 0.0
            assert found[row, column] == pytest.approx(expected, abs=1e-6)


def test_a_map_lies_where_its_patches_do(tmp_path: Path) -> None:
    """To one px of level 0 at all four corners, by the places in mm that both images state."""
    hd = load_highdicom()
    (source,) = write_series(tmp_path / "a", tissue_rgb(WIDTH, HEIGHT), factors=(1,), mpp=MPP, tile=211)
    columns = _columns(63.31)
    assert write_maps(str(tmp_path / "a"), _facts(63.31, len(columns["x"])), columns, tmp_path) == [
        "attention.dcm",
        "effect_tumour_yes.dcm",
    ]
    for name in ("attention", "effect_tumour_yes"):
        made = hd.imread(tmp_path / f"{name}.dcm")
        to_mm = hd.spatial.PixelToReferenceTransformer.for_image(made, for_total_pixel_matrix=True)
        to_px = hd.spatial.ReferenceToPixelTransformer.for_image(dcmread(source), for_total_pixel_matrix=True)
        pixels = made.get_total_pixel_matrix(dtype=np.float32)
        assert pixels.shape == (HEIGHT, WIDTH)
        corners = [int(np.hypot(columns["x"] - x, columns["y"] - y).argmin()) for x in (0, 877) for y in (0, 691)]
        assert len(set(corners)) == 4
        for at in corners:
            rows, across = np.nonzero(pixels == columns[name][at])
            ends = np.array([[across.min(), rows.min()], [across.max(), rows.max()]])
            places = to_px(to_mm(ends))[:, :2]
            corner = np.array([columns["x"][at], columns["y"][at]])
            assert np.abs(places[0] - corner).max() <= 1
            assert np.abs(places[1] + 1 - corner - 63.31).max() <= 1


@pytest.mark.parametrize(("patch", "level"), [(70.3, 2), (7.9, 1), (1.5, 0)])
def test_a_map_has_the_px_of_the_coarsest_level_that_shows_every_patch(
    patch: float, level: int, tmp_path: Path
) -> None:
    paths = write_series(tmp_path / "a", tissue_rgb(WIDTH, HEIGHT), factors=(1, 2, 8), mpp=MPP)
    columns = {name: values[:50] for name, values in _columns(71.7).items()}
    write_maps(str(paths[1]), _facts(patch, 50), columns, tmp_path)
    source, made = dcmread(paths[level]), dcmread(tmp_path / "attention.dcm")
    assert made.SOPClassUID == ParametricMapStorage
    for keyword in (
        "TotalPixelMatrixColumns", "TotalPixelMatrixRows", "Rows", "Columns", "NumberOfFrames", "ImageOrientationSlide",
        "TotalPixelMatrixOriginSequence", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID",
    ):  # fmt: skip
        assert made[keyword].value == source[keyword].value, keyword
    spacing = [one.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing for one in (source, made)]
    assert spacing[0] == pytest.approx(spacing[1])
    assert made.DimensionOrganizationType == "TILED_FULL"
    (series,) = made.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == uid("slide", "series") != made.SeriesInstanceUID
    referred = [uid("slide", level), *([uid("slide", 0)] if level else [])]
    assert [one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence] == referred
    pixels = load_highdicom().imread(tmp_path / "attention.dcm").get_total_pixel_matrix(dtype=np.float32)
    size = pixels.shape[::-1]
    factor = (1, 2, 8)[level]
    assert np.array_equal(
        pixels, raster(columns["x"], columns["y"], columns["attention"], patch, size, (factor, factor))
    )


def test_the_same_numbers_make_the_same_files(tmp_path: Path) -> None:
    write_series(tmp_path / "a", tissue_rgb(WIDTH, HEIGHT), factors=(1, 8), mpp=MPP)
    columns = _columns(63.31)
    facts = _facts(63.31, len(columns["x"]))
    names, found = ("attention.dcm", "effect_tumour_yes.dcm"), []
    changed = {**columns, "attention": columns["attention"][::-1]}
    for place, own in (("one", columns), ("two", columns), ("other", changed)):
        (tmp_path / place).mkdir()
        write_maps(str(tmp_path / "a"), facts, own, tmp_path / place)
        found.append([(tmp_path / place / name).read_bytes() for name in names])
    assert found[0] == found[1]
    one, two, other = (
        dcmread(tmp_path / place) for place in (f"one/{names[0]}", f"one/{names[1]}", f"other/{names[0]}")
    )
    assert one.SeriesInstanceUID == two.SeriesInstanceUID != other.SeriesInstanceUID
    assert len({image.SOPInstanceUID for image in (one, two, other)}) == 3
    (mapping,) = one.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert (mapping.LUTLabel, mapping.LUTExplanation) == ("attention", "attention: share; sums to 1")
    assert one.SeriesDescription == "Maps of models:/sm?ll/3"


def _planes(path: Path) -> None:
    changed = dcmread(path)
    changed.TotalPixelMatrixFocalPlanes = 3
    changed.save_as(path)


def _spacing(path: Path) -> None:
    changed = dcmread(path.parent / "1.dcm")
    changed.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.0002527, 0.0002527]
    changed.save_as(path.parent / "1.dcm")


def _no_frame(path: Path) -> None:
    changed = dcmread(path.parent / "1.dcm")
    del changed.FrameOfReferenceUID
    changed.save_as(path.parent / "1.dcm")


def _small(path: Path) -> None:
    write_series(path.parent, tissue_rgb(61, 47))


def _nothing(path: Path) -> None:
    del path


@pytest.mark.parametrize(
    ("spoil", "px", "said"),
    [
        (_planes, 2**25, "it has several focal planes or optical paths; a map is of one"),
        (_spacing, 2**25, r"its level of 110 x 87 px says that its px are 1 times those at full resolution"),
        (_no_frame, 2**25, r"no map can be laid over it as its files are \(ValueError: .*Frame of Reference"),
        (_small, 2**25, "its files say 61 x 47 px where the slide has 877 x 691 px"),
        (_nothing, 9000, r"no larger than a patch has 110 x 87 px, and a map may have 9,000; write smaller levels"),
    ],
)
def test_a_slide_that_no_map_can_be_laid_over_says_why(
    spoil: Any, px: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = write_series(tmp_path / "a", tissue_rgb(WIDTH, HEIGHT), factors=(1, 8), mpp=MPP)
    spoil(first)
    monkeypatch.setattr(dicom, "MAX_PX", px)
    with pytest.raises(SlideError, match=said):
        write_maps(str(tmp_path / "a"), _facts(63.31, 1), _columns(63.31), tmp_path)


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"--dicom needs highdicom, .* pip install 'ips-pipeline\[dicom\]'"):
        predict("absent", ["a"], None, tmp_path, tracking_uri="unused", how=How(dicom=True))


@pytest.mark.slow
def test_predictions_of_a_folder_of_slides(tmp_path: Path) -> None:
    """A DICOM slide has the numbers of its pixels in another file; others are predicted too, and have no map."""
    rgb = tissue_rgb(211, 157)
    write_series(tmp_path / "set" / "1.2.840", rgb, factors=(1, 4))
    (tmp_path / "set" / "bad").mkdir()
    write_series(tmp_path / "lost", rgb, name="lost")[1].rename(tmp_path / "set" / "bad" / "1.dcm")
    write_pyramid(tmp_path / "set" / "b.tif", rgb, levels=1)
    Image.fromarray(rgb).save(tmp_path / "same.png")
    config, out = small_config(), tmp_path / "out"
    asked = [str(tmp_path / name) for name in ("set", "same.png")]
    model = str(write_model(tmp_path, config))
    found = predict(model, asked, None, out, tracking_uri="unused", how=How(dicom=True))
    assert found["slides"] == 4
    assert "full resolution is missing" in found["failed"].pop("bad")
    assert found["failed"] == {}
    facts = {name: json.loads((out / "slides" / name / "slide.json").read_text()) for name in ("1.2.840", "same", "b")}
    assert facts["1.2.840"]["values"] == facts["same"]["values"]
    assert facts["1.2.840"]["dicom"] == {
        "files": ["attention.dcm", "effect_tumour_no.dcm", "effect_tumour_yes.dcm"],
        "why": None,
    }
    assert all("it is no DICOM slide" in facts[name]["dicom"]["why"] for name in ("same", "b"))
    made = dcmread(out / "slides" / "1.2.840" / "attention.dcm")
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == uid("slide", "series")
    again = predict(model, asked, None, out, tracking_uri="unused", how=How(dicom=True))
    assert again["predicted_now"] == 0
