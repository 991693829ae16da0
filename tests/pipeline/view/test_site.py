"""What is answered; and that slide and layers lie upon one another to the px, at all corners."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.errors import SlideError
from pipeline.slides.open import open_slide
from pipeline.storage.staging import Staging
from pipeline.view.outputs import Output
from pipeline.view.routes import Route, parse
from pipeline.view.site import Site
from tests.pipeline.view.made import apart, coordinates_of, coordinates_rgb, grid, write_output
from tests.synth import leica_xml, write_pyramid

CANVAS, CORNER = (2206, 1638), (212, 174)


@dataclass(frozen=True)
class _Case:
    """A slide that encodes its coordinates, and patches on it."""

    suffix: str
    mpp: float
    extent: float
    stride: float
    size: tuple[int, int] = (1789, 1283)

    def write(self, folder: Path) -> tuple[Path, tuple[int, int], tuple[int, int]]:
        """The slide, its dimensions and where on it the scan begins."""
        width, height = self.size
        rgb = coordinates_rgb(width, height)
        path = folder / f"slide{self.suffix}"
        if self.suffix == ".scn":
            told = leica_xml([(width, height), (width // 2, height // 2)], CANVAS, CORNER, self.mpp)
            write_pyramid(path, rgb, levels=2, quality=100, mpp=self.mpp, description=told)
        else:
            write_pyramid(path, rgb, levels=2, quality=100, mpp=self.mpp)
        with open_slide(path) as reader:
            return path, reader.dimensions, (reader.bounds.left, reader.bounds.top)


CASES = {
    "rounded": _Case(".tiff", 0.2527, 256 * 0.5 / 0.2527, 256 * 0.5 / 0.2527),
    "overlap": _Case(".tiff", 0.2527, 256 * 0.25 / 0.2527, 128 * 0.25 / 0.2527),
    "gaps": _Case(".tiff", 0.5, 97.3, 131.7),
    "bounds": _Case(".scn", 0.253, 151.9, 151.9, (1790, 1282)),  # whole nm and px, else OpenSlide blends them
}


def _pixels(site: Site, *path: object) -> npt.NDArray[np.uint8]:
    route = parse("/" + "/".join(map(str, path)))
    assert route is not None
    return np.asarray(Image.open(io.BytesIO(site.picture(route).data)).convert("RGBA"))


def _whole(site: Site, kind: str, steps: list[dict[str, Any]], step: int) -> npt.NDArray[np.uint8]:
    """All tiles of a step side by side (h, w, 4); with what raw ones hold beyond the slide's edge."""
    one = steps[step]
    rows = [
        np.concatenate(
            [_pixels(site, site.tag, 0, kind, step, column, row) for column in range(one["columns"])], axis=1
        )
        for row in range(one["rows"])
    ]
    return np.concatenate(rows)


def _clear(end: int) -> int:
    """The last coordinate before an edge that does not lie by a multiple of 64."""
    return next(x for x in range(end - 3, 0, -1) if x % 64 in range(8, 57))


@pytest.mark.parametrize("name", CASES)
def test_slide_and_layers_lie_upon_one_another_at_all_corners(name: str, tmp_path: Path) -> None:
    """On every step that halves: the slide's px say where they are, the layer's edges where the patches are."""
    case = CASES[name]
    path, dimensions, (left, top) = case.write(tmp_path)
    width, height = case.size
    corners, size = grid(width, height, case.extent, case.stride)
    corners += np.array([left, top])
    score = np.full(len(corners), 5.0)
    slide = {
        "uri": path,
        "dimensions": dimensions,
        "corners": corners,
        "size": size,
        "score": score,
        "selected": score > 9,
    }
    with closing(Site([Output(str(write_output(tmp_path / "out", {"a": slide})))], Staging())) as site:
        _check_corners(site, dimensions, (left, top), case, corners, size)


def _check_corners(
    site: Site,
    dimensions: tuple[int, int],
    corner: tuple[int, int],
    case: _Case,
    corners: npt.NDArray[np.float64],
    size: npt.NDArray[np.float64],
) -> None:
    (left, top), (width, height) = corner, case.size
    told = json.loads(site.detailed(0))
    assert (told["width"], told["height"], told["bounds"]) == (*dimensions, [left, top, width, height])
    layer = next(number for number, one in enumerate(site.layers) if one.name == "read")
    for back in (1, 2):
        scale = told["steps"][-back]["downsample"]
        assert scale == pytest.approx(back, rel=2e-3)
        seen = _whole(site, "tile", told["steps"], len(told["steps"]) - back)
        for x in (left + 10, left + _clear(width)):
            for y in (top + 10, top + _clear(height)):
                column, row = int(x / scale), int(y / scale)
                at = coordinates_of(seen[row, column])
                assert apart(at[0], (column + 0.5) * scale - 0.5 - left) <= 1, (back, x, y)
                assert apart(at[1], (row + 0.5) * scale - 0.5 - top) <= 1, (back, x, y)
        covered = _whole(site, f"layer/{layer}", told["layerSteps"], len(told["layerSteps"]) - back)[..., 3] == 0
        scale = told["layerSteps"][-back]["downsample"]
        ends = corners + size[:, None]
        for axis, found in ((0, np.flatnonzero(covered.any(0))), (1, np.flatnonzero(covered.any(1)))):
            assert abs(found[0] * scale - corners[:, axis].min()) <= 1
            assert abs((found[-1] + 1) * scale - ends[:, axis].max()) <= 1


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Site]:
    """Two models on one slide; the first looks at the left, the second at the right."""
    path = write_pyramid(tmp_path / "a.tiff", coordinates_rgb(640, 384), levels=1)
    corners, size = grid(640, 384, 128, 128)
    outs = []
    for number, side in enumerate((1.0, -1.0)):
        score = np.where((corners[:, 0] < 320) == (side > 0), 1.9, 0.1)
        slide = {
            "uri": path, "dimensions": (640, 384), "corners": corners, "size": size, "score": score, "mpp": 0.5,
            "selected": score > 1, "effect": side * score, "p": 0.6 + 0.2 * side, "label": "yes",
        }  # fmt: skip
        gone = {"uri": tmp_path / "gone.tiff", "error": "gone.tiff: no such file"}
        write_output(tmp_path / f"out{number}", {"a": slide, "gone": gone}, model=f"models:/demo/{number}")
        outs.append(Output(str(tmp_path / f"out{number}")))
    site = Site(outs, Staging())
    yield site
    site.close()


def test_the_list_says_what_both_models_say(two: Site) -> None:
    told = json.loads(two.listed())
    assert told["models"] == ["models:/demo/0", "models:/demo/1"]
    names = [(layer["name"], layer["model"]) for layer in told["layers"]]
    effect = "effect_tumour_lesion"
    assert names == [
        ("tissue", None), ("read", None), ("attention", 0), (effect, 0), ("attention", 1), (effect, 1),
        ("difference", None),
    ]  # fmt: skip
    first, second = told["slides"]
    assert (first["id"], first["label"], first["told"][0]["value"]) == ("a", "yes", 0.8)
    assert first["other"][0]["value"] == pytest.approx(0.4)
    assert second["reason"] == "gone.tiff: no such file"


def test_no_answer_names_a_path(two: Site, tmp_path: Path) -> None:
    for said in (two.listed(), two.detailed(0)):
        assert str(tmp_path).encode() not in said


def test_top_patches_come_in_their_order_with_their_numbers(two: Site) -> None:
    told = json.loads(two.detailed(0))
    first, second = told["models"]
    assert told["layers"] == [1, 2, 3, 4, 5, 6]  # nobody said where tissue is
    assert (first["count"], first["selected"]) == (15, 9)
    assert first["mass"] == pytest.approx(9 * 1.9 / (9 * 1.9 + 6 * 0.1))
    assert first["top"][0]["values"] == pytest.approx({"attention": 1.9, "effect_tumour_lesion": 1.9})
    assert [first["top"][0][name] for name in ("x", "y", "size", "selected")] == [0, 0, 128, True]
    assert second["top"][0]["x"] == 384
    assert len(first["frames"]) == 9


def test_the_difference_is_blue_where_the_second_model_looks_and_vermilion_where_the_first_does(two: Site) -> None:
    pixels = _pixels(two, two.tag, 0, "layer", 6, 1, 0, 0)
    left, right = pixels[50, 50].astype(int), pixels[50, 400].astype(int)
    assert left[0] > left[2]
    assert right[2] > right[0]
    assert left[3] > 200
    assert right[3] > 200


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("9/tile/0/0/0", "no slide 9 of 2"),
        ("0/tile/9/0/0", r"no step 9 of \d"),
        ("0/tile/0/99/0", "99"),
        ("0/layer/99/0/0/0", "no layer 99 of 7"),
        ("0/layer/1/99/0/0", r"no step 99 of \d+"),
        ("0/layer/0/0/0/0", "slide 0 has no layer tissue"),
    ],
)
def test_what_is_not_there_is_an_index_error_that_names_it(two: Site, path: str, words: str) -> None:
    with pytest.raises(IndexError, match=words):
        _pixels(two, two.tag, path)


def test_a_slide_that_is_gone_is_its_error(two: Site) -> None:
    with pytest.raises(SlideError, match="no such file"):
        two.picture(Route("tile", two.tag, "", (1, 0, 0, 0)))
