"""The page in a real browser: clicks, keys, what is drawn where, and a console that says nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from pipeline.storage.ranges import Range, RemoteSource
from pipeline.view.gate import gate
from pipeline.view.outputs import Output
from pipeline.view.run import address, serving
from pipeline.view.server import ViewServer
from tests.pipeline.view.browser import chromium, complaints, logged, press, settled, shown, until
from tests.pipeline.view.made import apart, coordinates_of, coordinates_rgb, grid, write_output
from tests.s3 import S3Server
from tests.synth import tissue_rgb, write_pyramid

pytestmark = pytest.mark.slow

WIDTH, HEIGHT, EXTENT = 2311, 1789, 256 * 0.5 / 0.2527


def _slide(path: Path, side: int) -> Mapping[str, Any]:
    corners, size = grid(WIDTH, HEIGHT, EXTENT, EXTENT)
    score = np.linspace(0.1, 1.9, len(corners))[:: 1 if side else -1]
    return {
        "uri": path, "dimensions": (WIDTH, HEIGHT), "corners": corners, "size": size,
        "score": score**4, "selected": score > 1.5, "effect": score - 1,
        "mpp": 0.2527, "label": "tumour", "p": 0.7 - 0.4 * side,
    }  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as session:
        yield session


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ViewServer]:
    folder = tmp_path_factory.mktemp("page")
    tissue = write_pyramid(folder / "tissue.tiff", tissue_rgb(WIDTH, HEIGHT), mpp=0.2527)
    places = write_pyramid(folder / "places.tiff", coordinates_rgb(WIDTH, HEIGHT), quality=100, levels=2, mpp=0.2527)
    outs = []
    for side in range(2):
        slides: dict[str, Mapping[str, Any]] = {"tissue": _slide(tissue, side), "places": _slide(places, side)}
        slides["gone"] = {"uri": folder / "gone.tiff", "error": "gone.tiff: no such file"}
        outs.append(Output(str(write_output(folder / f"out{side}", slides, model=f"models:/demo/{side}"))))
    with serving(outs, gate("127.0.0.1", None)) as viewer:
        yield viewer


def _open(browser: webdriver.Chrome, viewer: ViewServer, hash: str = "", slide: str = "tissue") -> None:  # noqa: A002
    browser.get("about:blank")
    complaints(browser)
    browser.get(address(viewer) + hash)
    shown(browser, slide)


def _place(browser: webdriver.Chrome) -> dict[str, str]:
    """What the address says, once it has been written."""
    settled(browser)
    return dict(part.split("=", 1) for part in browser.current_url.partition("#")[2].split("&"))


def _canvas(browser: webdriver.Chrome) -> npt.NDArray[np.uint8]:
    """Px of the picture (h, w, 3), without what lies over it."""
    data = browser.execute_async_script(
        "document.querySelector('.openseadragon-canvas canvas').toBlob(async (blob) =>"
        " arguments[0](Array.from(new Uint8Array(await blob.arrayBuffer()))))"
    )
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def _check_scale(browser: webdriver.Chrome) -> None:
    """The scale bar is as long as it says."""
    per_pixel = float(_place(browser)["z"])
    scale = browser.find_element(By.CSS_SELECTOR, ".scale")
    length, unit = scale.text.split()[:2]
    assert unit == "\N{MICRO SIGN}m"
    width = scale.find_element(By.CSS_SELECTOR, ".bar").size["width"]
    assert width * per_pixel * 0.2527 == pytest.approx(float(length), rel=0.02)


def test_a_slide_is_shown_with_what_is_known_of_it(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    _open(browser, viewer)
    names = [item.text.splitlines() for item in browser.find_elements(By.CSS_SELECTOR, "#list button")]
    assert [lines[0] for lines in names] == ["tissue", "places", "gone"]
    assert names[0][1:] == ["label tumour", "tumour_lesion 0.700 (calibrated: 0.600 to 0.800)"]
    assert names[2][1:] == ["gone.tiff: no such file"]
    panel = browser.find_element(By.ID, "panel").text
    for told in (
        "0.2527 µm/px",
        "of the attention is in the",
        "Attention is not effect.",
        "tumour_lesion, models:/demo/1",
    ):
        assert told in panel
    _check_scale(browser)
    assert "5\N{MULTIPLICATION SIGN}" in browser.find_element(By.CSS_SELECTOR, ".legend").text
    pixels = _canvas(browser).reshape(-1, 3)
    assert (np.ptp(pixels.astype(int), axis=1) > 40).mean() > 0.05  # stained tissue is there
    assert complaints(browser) == []


def test_keys_lead_through_patches_slides_layers_and_opacity(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    _open(browser, viewer)
    press(browser, "n")
    first = _place(browser)
    most = grid(WIDTH, HEIGHT, EXTENT, EXTENT)[0][0]  # the first model looks at the first patch most
    assert float(first["x"]) == pytest.approx(most[0] + EXTENT / 2, abs=0.01)
    assert first["patch"] == "1"
    assert "Patch 1 of" in browser.find_element(By.ID, "patch").text
    frame = browser.find_element(By.CSS_SELECTOR, ".focus").rect
    assert frame["width"] == pytest.approx(EXTENT / float(first["z"]), abs=1.5)
    press(browser, "np")
    assert _place(browser)["patch"] == "1"
    press(browser, "p")
    assert int(_place(browser)["patch"]) == len(grid(WIDTH, HEIGHT, EXTENT, EXTENT)[0])  # round to the last
    press(browser, "]")
    assert float(_place(browser)["opacity"]) == pytest.approx(0.8)
    press(browser, "o")
    assert _place(browser)["layer"] == ""
    press(browser, "ol")
    assert _place(browser)["layer"].startswith("effect_tumour_lesion")
    press(browser, "h")
    assert float(_place(browser)["x"]) == pytest.approx(WIDTH / 2, abs=1)
    press(browser, "++++")
    press(browser, "j")
    shown(browser, "places")
    _check_scale(browser)
    assert browser.find_element(By.CSS_SELECTOR, "#list [aria-current]").text.startswith("places")
    press(browser, "k")
    shown(browser, "tissue")
    press(browser, "?")
    assert browser.find_element(By.ID, "keys").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#keys button").click()
    assert complaints(browser) == []


def test_the_mouse_does_what_keys_do(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    _open(browser, viewer)
    browser.find_element(By.ID, "next").click()
    assert _place(browser)["patch"] == "1"
    browser.find_element(By.ID, "frames").click()
    assert browser.find_elements(By.CSS_SELECTOR, ".frame") == []
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("Difference of the models")
    assert _place(browser)["layer"] == "difference"
    browser.find_element(By.ID, "filter").send_keys("plac")
    rows = browser.find_elements(By.CSS_SELECTOR, "#list li")
    assert [row.is_displayed() for row in rows] == [False, True, False]
    browser.find_elements(By.CSS_SELECTOR, "#list button")[1].click()
    shown(browser, "places")
    assert complaints(browser) == []


def test_the_address_leads_back_to_where_one_was(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    _open(browser, viewer, "#slide=places&layer=read&x=1500&y=700&z=0.5&opacity=0.4&frames=no", "places")
    place = _place(browser)
    assert (place["slide"], place["layer"], place["frames"]) == ("places", "read", "no")
    assert [float(place[name]) for name in ("x", "y", "z", "opacity")] == pytest.approx([1500, 700, 0.5, 0.4])
    _check_scale(browser)
    assert Select(browser.find_element(By.ID, "layer")).first_selected_option.text.startswith("Patches read")
    assert complaints(browser) == []


def test_two_models_are_shown_in_windows_that_move_together(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    _open(browser, viewer)
    press(browser, "c")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".pane")) == 2, "two windows")
    shown(browser, "tissue")
    titles = [title.text for title in browser.find_elements(By.CSS_SELECTOR, ".pane h2")]
    assert titles == ["models:/demo/0", "models:/demo/1"]
    press(browser, "n")
    assert _place(browser)["pair"] == "yes"
    frames = [one.rect for one in browser.find_elements(By.CSS_SELECTOR, ".focus")]
    panes = [one.rect for one in browser.find_elements(By.CSS_SELECTOR, ".pane")]
    left, right = (frame["x"] - pane["x"] for frame, pane in zip(frames, panes, strict=True))
    assert left == pytest.approx(right, abs=1)
    assert frames[0]["y"] == pytest.approx(frames[1]["y"], abs=1)
    press(browser, "c")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".pane")) == 1, "one window")
    assert complaints(browser) == []


@pytest.mark.parametrize("zoom", [0.5, 2.0])
@pytest.mark.parametrize("corner", [(False, False), (True, False), (False, True), (True, True)])
def test_px_on_the_screen_are_where_the_address_says(
    browser: webdriver.Chrome, viewer: ViewServer, corner: tuple[bool, bool], zoom: float
) -> None:
    """At the four corners of a slide whose px say where they are: within one level-0 px, and so are the layer's edges.

    Where a px of the screen is two of level 0 (the file's second level is seen), within one of the screen, by which
    tiles are drawn larger so that no seams are seen, and what the colours' rounding makes of it.
    """
    at = [(edge - 150 * zoom if far else 150 * zoom) for far, edge in zip(corner, (WIDTH, HEIGHT), strict=True)]
    where = f"#slide=places&layer=&frames=no&x={at[0]}&y={at[1]}&z={zoom}"
    _open(browser, viewer, where, "places")
    plain = _canvas(browser)
    place = {name: float(value) for name, value in _place(browser).items() if name in "xyz"}
    judged = 0
    for row, column in ((0.5, 0.5), (0.45, 0.48), (0.55, 0.53), (0.4, 0.45), (0.6, 0.58)):
        y, x = int(plain.shape[0] * row), int(plain.shape[1] * column)
        meant = [
            place[axis] + (px + 0.5 - size / 2) * place["z"] - 0.5
            for axis, px, size in (("x", x, plain.shape[1]), ("y", y, plain.shape[0]))
        ]
        if all(value % 64 > 6 and value % 64 < 58 for value in meant):
            found = [apart(*pair) for pair in zip(coordinates_of(plain[y, x]), meant, strict=True)]
            assert max(found) <= (1 if zoom < 1 else zoom + 0.6), (found, meant)
            judged += 1
    assert judged
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("Patches read (the rest darkened)")
    settled(browser)
    dark = np.abs(_canvas(browser).astype(int) - plain).sum(axis=2) > 6
    corners, size = grid(WIDTH, HEIGHT, EXTENT, EXTENT)
    ends = (corners + size[:, None]).max(axis=0)  # beyond them no patch was read
    for axis, name, other in ((1, "x", "y"), (0, "y", "x")):
        line = dark[dark.shape[0] // 2] if axis == 1 else dark[:, dark.shape[1] // 2]
        edge = (ends[1 - axis] - place[name]) / place["z"] + dark.shape[axis] / 2
        if 10 < edge < len(line) - 10 and place[other] < ends[axis]:
            reach = max(1, 1 / zoom)  # px of the screen
            assert not line[int(edge - reach) - 6 : int(edge - reach)].any()
            assert line[int(edge + reach) + 1 : int(edge + reach) + 7].all()


def test_a_slide_that_is_gone_is_said_and_the_next_is_shown(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    browser.get("about:blank")
    browser.get(address(viewer) + "#slide=gone")
    until(lambda: "no such file" in browser.find_element(By.ID, "trouble").text, "the reason")
    press(browser, "k")
    shown(browser, "places")
    assert not browser.find_element(By.ID, "trouble").is_displayed()


def test_a_link_to_a_slide_that_is_not_here_says_so_and_opens_no_place_of_it(
    browser: webdriver.Chrome, viewer: ViewServer
) -> None:
    _open(browser, viewer, "#slide=absent&x=300&y=200&z=0.5&patch=3")
    assert browser.find_element(By.ID, "trouble").text == "no slide absent here; this is the first"
    place = _place(browser)
    assert (place["slide"], place.get("patch")) == ("tissue", None)
    assert float(place["x"]) == pytest.approx(WIDTH / 2, abs=1)
    press(browser, "j")
    shown(browser, "places")
    assert not browser.find_element(By.ID, "trouble").is_displayed()
    assert complaints(browser) == []


@pytest.mark.parametrize("patch", ["2.5", "999", "0", "-1", "x"])
def test_a_patch_that_is_none_of_the_top_ones_is_ignored(
    browser: webdriver.Chrome, viewer: ViewServer, patch: str
) -> None:
    _open(browser, viewer, f"#slide=tissue&patch={patch}")
    assert "patch" not in _place(browser)
    assert browser.find_element(By.ID, "patch").text.endswith("top patches")
    assert not browser.find_element(By.ID, "trouble").is_displayed()
    assert complaints(browser) == []


def test_no_request_leaves_the_server(browser: webdriver.Chrome, viewer: ViewServer) -> None:
    logged(browser, "performance")
    _open(browser, viewer)
    press(browser, "n")
    settled(browser)
    sent = [json.loads(entry["message"])["message"] for entry in logged(browser, "performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address(viewer), "about:", "data:", "blob:"))] == []


def test_a_slide_in_a_bucket_is_looked_at_by_ranges(
    browser: webdriver.Chrome, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy: what travels are the directories and the tiles that are seen."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket = Path(server.folder) / "slides"
    rgb = np.tile(tissue_rgb(1501, 1401), (5, 6, 1))[:7001, :9001]
    path = write_pyramid(bucket / "large.tiff", rgb, tile=256, levels=6, quality=95)
    travelled, read = [], RemoteSource.read

    def counted(source: RemoteSource, ranges: Sequence[Range]) -> list[bytes]:
        found = read(source, ranges)
        travelled.append(sum(map(len, found)))
        return found

    monkeypatch.setattr(RemoteSource, "read", counted)
    slide = {**_slide(path, 0), "uri": "s3://slides/large.tiff", "dimensions": (9001, 7001)}
    out = Output(str(write_output(tmp_path / "out", {"large": slide})))
    with serving([out], gate("127.0.0.1", None)) as viewer:
        browser.get(address(viewer))
        shown(browser, "large")
        press(browser, "n")
        settled(browser)
    assert 0 < sum(travelled) < path.stat().st_size / 10
