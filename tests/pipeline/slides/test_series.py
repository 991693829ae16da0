"""Which image of a TIFF is the slide, in files whose images stand in every order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from pipeline.errors import SlideError
from pipeline.slides.open import SlideReader, open_slide, open_uri
from pipeline.slides.openslide import OpenSlideReader
from pipeline.slides.reader import Picked, has_shape_of
from pipeline.slides.series import Series, find_series
from pipeline.storage.staging import Staging
from tests.s3 import S3Server
from tests.synth import overwrite, tissue_rgb

RGB8 = np.ndarray[Any, np.dtype[np.uint8]]

SCAN = tissue_rgb(613, 521)
MACRO = tissue_rgb(397, 167, seed=1)
OTHER = tissue_rgb(571, 499, seed=2)
MPP = 0.5
JPEG: dict[str, Any] = {
    "tile": (64, 64),
    "compression": "jpeg",
    "compressionargs": {"level": 95},
    "subsampling": (1, 1),
    "photometric": "rgb",
}
LZW: dict[str, Any] = {"tile": (64, 64), "compression": "lzw", "photometric": "rgb"}
GREYS = np.arange(256, dtype=np.uint16) * 257
PALETTE: dict[str, Any] = {"tile": (64, 64), "photometric": "palette", "colormap": np.stack([GREYS] * 3)}
STRIPS: dict[str, Any] = {"compression": "jpeg", "photometric": "rgb"}


def small(rgb: RGB8, factor: int) -> RGB8:
    """Area-averaged, of whole px."""
    size = (rgb.shape[1] // factor, rgb.shape[0] // factor)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def microns(mpp: float) -> dict[str, Any]:
    """Resolution tags."""
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": 3}


def pages(path: Path, *written: tuple[RGB8, dict[str, Any]], **how: Any) -> Path:
    """A TIFF of these directories in this order."""
    with tifffile.TiffWriter(path, **how) as tiff:
        for rgb, options in written:
            tiff.write(rgb, **({"metadata": None} | options))
    return path


def image_xml(
    rgb: RGB8, name: str, ifd: int | None, mpp: float | None, sizes: str = 'SizeZ="1" SizeT="1"', planes: int = 1
) -> str:
    """An Image of RGB planes."""
    physical = "" if mpp is None else f'PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}"'
    data = "" if ifd is None else f'<TiffData IFD="{ifd}" PlaneCount="{planes}"/>'
    return (
        f'<Image ID="Image:{name}" Name="{name}"><Pixels ID="Pixels:{name}" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{rgb.shape[1]}" SizeY="{rgb.shape[0]}" SizeC="3" {sizes} {physical}>'
        f'<Channel ID="Channel:{name}" SamplesPerPixel="3"/>{data}</Pixels></Image>'
    )


def ome(*images: str) -> dict[str, Any]:
    """The description of the first directory."""
    head = '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    return {"description": f"{head}{''.join(images)}</OME>"}


def is_like(reader: SlideReader, rgb: RGB8) -> bool:
    """Whether level 0 is this picture but for what JPEG does to it."""
    width, height = reader.dimensions
    if (height, width) != rgb.shape[:2]:
        return False
    found = reader.read(0, 0, 0, width, height).astype(int)
    return bool(np.abs(found - rgb).mean() < 4)


def levels(reader: SlideReader) -> list[tuple[int, int]]:
    return [(level.width, level.height) for level in reader.levels]


def refusal(path: Path, series: int | None = None) -> str:
    """What is said of a file that is refused for its images."""
    with pytest.raises(SlideError) as caught:
        open_slide(path, series)
    assert caught.value.reason == "series"
    return str(caught.value)


def test_the_pictures_are_unlike() -> None:
    """So that `is_like` tells them apart."""
    assert np.abs(SCAN[:499, :571].astype(int) - OTHER).mean() > 10
    assert not has_shape_of((397, 167), (613, 521))


@pytest.mark.parametrize("named", ["macro", "Macro image", "slide 7 - label", "", "Image 0"])
def test_an_ome_tiff_whose_first_image_is_the_macro(tmp_path: Path, named: str) -> None:
    """By name, by its microns or, without either, by its size."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        mpp = {} if named == "macro" else {"PhysicalSizeX": 16.4, "PhysicalSizeY": 16.4}
        tiff.write(MACRO, **JPEG, metadata={"axes": "YXS", "Name": named, **mpp})
        scan = {"axes": "YXS", "Name": "scan", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        tiff.write(SCAN, subifds=1, **JPEG, metadata=scan)
        tiff.write(small(SCAN, 2), subfiletype=1, **JPEG)
    with open_slide(tmp_path / "a.ome.tif") as reader:
        assert is_like(reader, SCAN)
        assert levels(reader) == [(613, 521), (306, 260)]
        assert (reader.mpp, reader.vendor, reader.series) == ((MPP, MPP), "ome-tiff", None)
        assert reader.picked == Picked(1, "scan", 2, None, named=False)
    with open_slide(tmp_path / "a.ome.tif", 0) as reader:
        assert is_like(reader, MACRO)
        assert reader.mpp == (None if named == "macro" else (16.4, 16.4))
        assert reader.series == 0
    with open_slide(tmp_path / "a.ome.tif", 1) as reader:
        assert reader.series is None  # as unasked: the same slide
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        theirs = [(one.name, one.shape[1::-1], len(one.levels)) for one in tiff.series]
        assert [(one.name, one.size, len(one.levels)) for one in find_series(tiff)] == theirs


@pytest.mark.parametrize("wrong", [False, True])
def test_an_image_of_the_xml_is_matched_by_directory_and_by_size(tmp_path: Path, *, wrong: bool) -> None:
    """The label comes first in the XML and second in the file; an XML that is wrong about that is caught by sizes."""
    xml = ome(image_xml(MACRO, "label", int(not wrong), 0.25), image_xml(SCAN, "scan", int(wrong), MPP))
    path = pages(tmp_path / "a.ome.tif", (SCAN, JPEG | xml), (MACRO, JPEG))
    with open_slide(path) as reader:
        assert is_like(reader, SCAN)
        assert reader.mpp == (MPP, MPP)
        assert reader.picked == Picked(1, "scan", 2, None, named=False)


def test_an_xml_that_does_not_say_where_its_images_lie(tmp_path: Path) -> None:
    xml = ome(image_xml(MACRO, "", None, 16.4), image_xml(SCAN, "", None, MPP))
    path = pages(tmp_path / "a.ome.tif", (SCAN, JPEG | xml), (MACRO, JPEG))
    with open_slide(path) as reader:
        assert is_like(reader, SCAN)
        assert (reader.mpp, reader.picked and reader.picked.series) == ((MPP, MPP), 1)


def test_an_xml_of_another_picture_gives_no_microns(tmp_path: Path) -> None:
    path = pages(tmp_path / "a.ome.tif", (SCAN, JPEG | microns(0.25) | ome(image_xml(OTHER, "", 0, MPP))))
    with open_slide(path) as reader:
        assert reader.mpp == pytest.approx((0.25, 0.25))


def test_an_xml_that_is_wrong_about_the_labels_size_still_names_it(tmp_path: Path) -> None:
    """Which is nearly as large as the scan here."""
    xml = ome(image_xml(MACRO, "label", 1, 0.25), image_xml(SCAN, "scan", 0, MPP))
    with open_slide(pages(tmp_path / "a.ome.tif", (SCAN, JPEG | xml), (OTHER, JPEG))) as reader:
        assert is_like(reader, SCAN)
        assert (reader.mpp, reader.picked) == ((MPP, MPP), Picked(1, "scan", 2, None, named=False))
    with open_slide(tmp_path / "a.ome.tif", 0) as reader:
        assert is_like(reader, OTHER)
        assert reader.mpp is None


def test_microns_are_those_of_the_level_that_the_xml_describes(tmp_path: Path) -> None:
    """The largest level stands below a smaller one."""
    half = small(SCAN, 2)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(half, subifds=1, **JPEG, metadata=None, **ome(image_xml(half, "", 0, 2 * MPP)))
        tiff.write(SCAN, **JPEG)
    with open_slide(tmp_path / "a.ome.tif") as reader:
        assert is_like(reader, SCAN)
        assert levels(reader) == [(613, 521), (306, 260)]
        assert reader.mpp == pytest.approx((MPP, MPP), rel=2e-3)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("how", [JPEG, STRIPS], ids=["tiles", "strips"])
def test_a_thumbnail_before_the_scan(tmp_path: Path, how: dict[str, Any], *, big: bool) -> None:
    written = (small(SCAN, 3), how), (SCAN, how | microns(MPP))
    path = pages(tmp_path / "a.tif", *written, bigtiff=big)
    with open_slide(path) as reader:
        assert is_like(reader, SCAN)
        assert levels(reader) == [(613, 521)]
        assert reader.mpp == (pytest.approx((MPP, MPP)) if how is JPEG else None)
        assert reader.picked == Picked(1, "", 2, None, named=False)


def test_a_thumbnail_in_strips_before_the_scan_in_tiles_and_the_other_way_round(tmp_path: Path) -> None:
    for first, second in ((STRIPS, JPEG), (JPEG, STRIPS)):
        path = pages(tmp_path / "a.tif", (small(SCAN, 3), first), (SCAN, second))
        with open_slide(path) as reader:
            assert is_like(reader, SCAN)


def test_a_scan_below_its_thumbnail(tmp_path: Path) -> None:
    """As cameras write them: the directory is a reduced image, the picture stands in a SubIFD."""
    written = (small(SCAN, 3), JPEG | {"subifds": 1, "subfiletype": 1}), (SCAN, JPEG | microns(MPP))
    with open_slide(pages(tmp_path / "a.tif", *written)) as reader:
        assert is_like(reader, SCAN)
        assert levels(reader) == [(613, 521), (204, 173)]
        assert reader.mpp == pytest.approx((MPP, MPP))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_levels_in_every_order(tmp_path: Path, order: Sequence[int]) -> None:
    """As flagged directories, of which the first is none; as unflagged ones of an Aperio slide; as SubIFDs."""
    ladder = [SCAN, small(SCAN, 2), small(SCAN, 4)]
    plain = [
        (ladder[n], JPEG | microns(MPP * 2**n) | ({"subfiletype": 1} if place else {})) for place, n in enumerate(order)
    ]
    paths = [pages(tmp_path / "plain.tif", *plain)]
    text = {"description": "Aperio Image Library v11\r\n613x521 [0,0 613x521] (64x64) JPEG|AppMag = 20|MPP = 0.5000"}
    paths += [pages(tmp_path / "a.svs", *[(ladder[n], JPEG | text) for n in order])]
    below = [
        (ladder[n], JPEG | microns(MPP * 2**n) | ({} if place else {"subifds": 2})) for place, n in enumerate(order)
    ]
    paths += [pages(tmp_path / "below.tif", *below)]
    for path in paths:
        with open_slide(path) as reader:
            assert levels(reader) == [(613, 521), (306, 260), (153, 130)]
            assert [level.downsample for level in reader.levels] == pytest.approx([1, 2, 4], rel=1e-2)
            assert is_like(reader, SCAN)
            assert reader.mpp == pytest.approx((MPP, MPP))


APERIO = "Aperio Image Library v11.2.1 \r\n{}x{} [0,0 613x521] (64x64) JPEG/RGB Q=30|AppMag = 20|MPP = 0.5000|Left = 25"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Aperio Image Library v11.2.1 \r\nmacro 397x167", 9),
        ("Aperio Image Library v11.2.1 \r\nmacro 397x167", 0),
        ("Aperio Image Library v11.2.1 \r\nlabel 397x167", 1),
        (APERIO.format(397, 167), 9),
        (APERIO.format(397, 167), 0),
    ],
    ids=["all", "word", "label", "flag", "shape"],
)
def test_an_aperio_slide_whose_macro_is_tiled(tmp_path: Path, said: str, kind: int) -> None:
    """As OpenSlide has it where the macro is in strips."""
    scan = [(small(SCAN, n), JPEG | {"description": APERIO.format(613 // n, 521 // n)}) for n in (1, 4)]
    macro = {"description": said, "subfiletype": kind}
    clean = pages(tmp_path / "clean.svs", *scan, (MACRO, STRIPS | macro))
    for place in (0, 1, 2):
        written = [*scan[:place], (MACRO, JPEG | macro), *scan[place:]]
        with open_slide(pages(tmp_path / "a.svs", *written)) as reader, OpenSlideReader(clean) as theirs:
            assert reader.vendor == "aperio"
            assert levels(reader) == levels(theirs) == [(613, 521), (153, 130)]
            assert reader.mpp == theirs.mpp == (MPP, MPP)
            assert is_like(reader, SCAN)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tiled_macro_larger_than_the_scan_that_nothing_marks(tmp_path: Path, place: int) -> None:
    """The scan is what has the size that it declares; where none declares any, both could be the slide."""
    for text, found in ((APERIO, True), ("Aperio Image Library v11.2.1 \r\n{}x{}|MPP = 0.5000", False)):
        scan = [(small(SCAN, n), JPEG | {"description": text.format(613 // n, 521 // n)}) for n in (1, 4)]
        macro = np.tile(MACRO, (4, 3, 1)), JPEG | {"description": "Aperio Image Library v11.2.1 \r\n"}
        path = pages(tmp_path / "a.svs", *scan[:place], macro, *scan[place:])
        if found:
            with open_slide(path) as reader:
                assert levels(reader) == [(613, 521), (153, 130)]
                assert is_like(reader, SCAN)
                assert reader.mpp == (MPP, MPP)
        else:
            assert "of 613 x 521 px" in refusal(path)
            assert "of 1191 x 668 px" in refusal(path)


@pytest.mark.parametrize("place", [1, 2])
def test_missing_tiles_and_a_tiled_macro(tmp_path: Path, place: int) -> None:
    """OpenSlide would fill them from the macro before, or end the process where the macro is larger than a level."""
    scan = [(small(SCAN, n), JPEG | {"description": APERIO.format(613 // n, 521 // n)}) for n in (1, 4)]
    clean = pages(tmp_path / "clean.svs", *scan)
    path = pages(tmp_path / "a.svs", *scan[:place], (MACRO, JPEG | {"subfiletype": 9}), *scan[place:])
    for name in (clean, path):
        with tifffile.TiffFile(name) as tiff:
            at = tiff.pages.first.tags[325].valueoffset
        overwrite(name, at + 4 * 7, bytes(4))
    with open_slide(path) as reader, OpenSlideReader(clean) as expected:
        assert levels(reader) == levels(expected)[:1]
        assert np.array_equal(reader.read(0, 0, 0, 613, 521), expected.read(0, 0, 0, 613, 521))


@pytest.mark.parametrize("place", [1, 2])
def test_a_tiled_macro_is_no_level_where_openslide_reads_either(tmp_path: Path, place: int) -> None:
    """Tiles of its own kind of JPEG 2000 leave the slide to it."""
    how = LZW | {"compression": 33005}
    scan = [(small(SCAN, n), how | {"description": APERIO.format(613 // n, 521 // n)}) for n in (1, 4)]
    path = pages(
        tmp_path / "a.svs", *scan[:place], (small(MACRO, 3 * place - 2), JPEG | {"subfiletype": 9}), *scan[place:]
    )
    with tifffile.TiffFile(path) as tiff:
        places = [page.tags[259].valueoffset for page in tiff.pages if page.compression == 33005]
        counts = tiff.pages.first.tags[325].valueoffset
    for at in places:
        overwrite(path, at, (33003).to_bytes(2, "little"))
    with open_slide(path) as reader:
        assert isinstance(reader, OpenSlideReader)
        assert levels(reader) == [(613, 521), (153, 130)][:place]
    overwrite(path, counts + 4 * 7, bytes(4))
    assert "series 0 of 613 x 521 px" in refusal(path)


def test_a_macro_of_the_scans_shape_is_told_by_word_or_flag(tmp_path: Path) -> None:
    macro = small(OTHER, 2)[:130, :153]
    for more in ({"description": "Aperio Image Library v11.2.1 \r\nmacro 153x130"}, {"subfiletype": 9}):
        written = (SCAN, JPEG | {"description": APERIO.format(613, 521)}), (macro, JPEG | more)
        with open_slide(pages(tmp_path / "a.svs", *written)) as reader:
            assert levels(reader) == [(613, 521)]


@pytest.mark.parametrize("kind", [0, 1, 4, 9])
def test_what_stands_before_a_generic_pyramid(tmp_path: Path, kind: int) -> None:
    """A picture of the glass, unflagged, reduced, or as Aperio flags it; or a mask, of the scan's size at that."""
    first = SCAN[::-1] if kind == 4 else small(MACRO, 2)
    written = (first, JPEG | {"subfiletype": 1}), (SCAN, JPEG | microns(MPP))
    path = pages(tmp_path / "a.tif", *written, (small(SCAN, 2), JPEG | {"subfiletype": 1}))
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[254].valueoffset
    overwrite(path, at, bytes([kind]))
    with open_slide(path) as reader:
        assert levels(reader) == [(613, 521), (306, 260)]
        assert is_like(reader, SCAN)
        assert reader.mpp == pytest.approx((MPP, MPP))


def test_two_sections_of_a_generic_tiff(tmp_path: Path) -> None:
    written = (MACRO, JPEG | {"subfiletype": 9}), (SCAN, JPEG | microns(MPP)), (OTHER, JPEG | microns(0.25))
    path = pages(tmp_path / "a.tif", *written)
    said = refusal(path)
    assert "a.tif: several images could be the slide: series 1 of 613 x 521 px, series 2 of 571 x 499 px" in said
    assert "series column" in said
    for series, rgb, mpp in ((0, MACRO, None), (1, SCAN, MPP), (2, OTHER, 0.25)):
        with open_slide(path, series) as reader:
            assert is_like(reader, rgb)
            assert reader.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
            assert reader.series == series
    assert "there is no series 3, which the cohort names; it holds series 0 of 397 x 167 px" in refusal(path, 3)


def test_a_file_of_many_images_is_told_in_few_words(tmp_path: Path) -> None:
    path = pages(tmp_path / "a.tif", *[(SCAN[:64, : 70 + n], JPEG) for n in range(25)])
    assert "series 19 of 89 x 64 px and 5 more; give the number" in refusal(path)
    with open_slide(path, 24) as reader:
        assert reader.dimensions == (94, 64)


def test_two_sections_of_an_ome_tiff(tmp_path: Path) -> None:
    """One is much smaller, but as fine; each has levels of its own."""
    section = OTHER[100:320, 50:333]
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        for name, rgb, mpp in (("label", MACRO, 8.0), ("lower", section, MPP), ("upper", SCAN, MPP)):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(rgb, subifds=1, **JPEG, metadata=metadata)
            tiff.write(small(rgb, 2), subfiletype=1, **JPEG)
    said = refusal(tmp_path / "a.ome.tif")
    assert "series 1 'lower' of 283 x 220 px, series 2 'upper' of 613 x 521 px" in said
    assert "label" not in said
    with open_slide(tmp_path / "a.ome.tif", 1) as reader:
        assert is_like(reader, section)
        assert levels(reader) == [(283, 220), (141, 110)]
        assert reader.picked == Picked(1, "lower", 3, None, named=True)


def test_like_sections_share_no_reduced_directories(tmp_path: Path) -> None:
    """Nothing says whose they are."""
    other = tissue_rgb(613, 521, seed=3)
    reduced = [(small(rgb, 2), JPEG | {"subfiletype": 1}) for rgb in (SCAN, other)]
    path = pages(tmp_path / "a.tif", (SCAN, JPEG), (other, JPEG), *reduced)
    with open_slide(path, 1) as reader:
        assert levels(reader) == [(613, 521)]
        assert is_like(reader, other)


@pytest.mark.parametrize("series", [0, 1])
def test_an_image_that_only_openslide_reads(tmp_path: Path, series: int) -> None:
    """It takes the first; of another one nothing is read in its place."""
    first, second = SCAN[..., 1], tissue_rgb(613, 521, seed=3)[..., 1]
    path = pages(tmp_path / "a.tif", (first, PALETTE), (second, PALETTE))
    if series:
        assert "series 1 of 613 x 521 px" in refusal(path, series)
        return
    with open_slide(path, series) as reader:
        assert isinstance(reader, OpenSlideReader)
        assert is_like(reader, np.stack([first] * 3, -1))
        assert reader.series == 0


def test_a_thumbnail_that_openslide_would_take_is_not_taken(tmp_path: Path) -> None:
    path = pages(tmp_path / "a.tif", (small(SCAN, 3)[..., 1], PALETTE), (SCAN[..., 1], PALETTE))
    with openslide.OpenSlide(path) as theirs:
        assert theirs.dimensions == (204, 173)
    assert "vips copy 'IN[page=1]'" in refusal(path)


def test_a_series_on_s3(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in place, or as a copy; refused before anything is copied."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    folder = server.folder / "slides"
    pages(folder / "two.tif", (SCAN, JPEG), (OTHER, JPEG))
    pages(folder / "strips.tif", (SCAN, STRIPS), (OTHER, STRIPS))
    for name in ("two.tif", "strips.tif"):
        uri = f"s3://slides/{name}"
        with open_uri(uri, lambda uri=uri: [uri], Staging(str(tmp_path)), series=1) as reader:  # type: ignore[misc]
            assert is_like(reader, OTHER)
        with pytest.raises(SlideError, match="several images"), open_uri(uri, list, Staging(str(tmp_path / "none"))):
            pass
    assert not (tmp_path / "none").exists()


def test_a_series_of_what_a_library_picks(tmp_path: Path) -> None:
    Image.fromarray(SCAN).save(tmp_path / "a.png")
    assert "a.png: the cohort names series 0" in refusal(tmp_path / "a.png", 0)


@pytest.mark.parametrize(("depths", "middle"), [(2, 1), (3, 1), (4, 2)])
def test_of_a_stack_the_middle_plane_is_taken_and_named(tmp_path: Path, depths: int, middle: int) -> None:
    planes = [tissue_rgb(311, 269, seed=seed) for seed in range(depths)]
    with tifffile.TiffWriter(tmp_path / "z.ome.tif") as tiff:
        metadata = {"axes": "ZYXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        tiff.write(np.stack(planes), subifds=1, **JPEG, metadata=metadata)
        tiff.write(np.stack([small(plane, 2) for plane in planes]), subfiletype=1, **JPEG)
    text = APERIO.format(311, 269) + "|OffsetZ = {}"
    stack = [
        (small(plane, n), JPEG | {"description": text.format(2.5 * (z - middle))})
        for n in (1, 4)
        for z, plane in reversed(list(enumerate(planes)))
    ]
    for path in (tmp_path / "z.ome.tif", pages(tmp_path / "z.svs", *stack)):
        with open_slide(path) as reader:
            assert is_like(reader, planes[middle])
            assert len(reader.levels) == 2
            coarse = reader.read(1, 0, 0, *levels(reader)[1])
            expected = small(planes[middle], 2 if path.suffix == ".tif" else 4)
            assert np.abs(coarse.astype(int) - expected).mean() < 4
            assert reader.mpp == (MPP, MPP)
            assert reader.picked is not None
            assert reader.picked.plane == f"focal plane {middle + 1} of {depths}"


def test_of_a_hamamatsu_stack_the_nominal_focus_is_taken_and_named(tmp_path: Path) -> None:
    planes = [tissue_rgb(313, 271, seed=seed) for seed in range(3)]

    def ndpi(rgb: RGB8, lens: float, depth: int) -> tuple[RGB8, dict[str, Any]]:
        """In one strip, with the tags that tell OpenSlide what it is."""
        where = (65424, "i", 1, depth, True)
        tags = [(65420, "I", 1, 1, True), (65421, "f", 1, lens, True), where, (271, "s", 0, "Hamamatsu", True)]
        return rgb, STRIPS | microns(MPP) | {"rowsperstrip": rgb.shape[0], "extratags": tags, "subsampling": (1, 1)}

    written = [ndpi(plane, 20, 3000 * place) for plane, place in zip(planes, (-2, -1, 0), strict=True)]
    glass = ndpi(MACRO, -1, 0)
    path = pages(tmp_path / "a.tif", *written, ndpi(small(planes[2], 2), 10, 0), glass)
    with open_slide(path) as reader:
        assert reader.vendor == "hamamatsu"
        assert is_like(reader, planes[2])
        assert reader.picked == Picked(2, "", 4, "focal plane 3 of 3", named=False)
    assert "of this format the library picks the slide" in refusal(path, 0)
    with open_slide(pages(tmp_path / "b.tif", written[2], glass)) as reader:
        assert reader.picked is None


def test_of_a_time_series_the_first_is_taken(tmp_path: Path) -> None:
    frames = [tissue_rgb(311, 269, seed=seed) for seed in range(4)]
    with tifffile.TiffWriter(tmp_path / "t.ome.tif") as tiff:
        tiff.write(np.stack(frames).reshape(2, 2, 269, 311, 3), **JPEG, metadata={"axes": "TZYXS"})
    with open_slide(tmp_path / "t.ome.tif") as reader:
        assert is_like(reader, frames[1])
        assert reader.picked == Picked(0, "Image0", 1, "focal plane 2 of 2, time 1 of 2", named=False)


def test_channels_in_planes_have_no_level_of_one_plane(tmp_path: Path) -> None:
    """Reduced directories, of each channel one, that nothing assigns to channels."""
    grey = {**LZW, "photometric": "minisblack", "metadata": None}
    xml = ome(image_xml(SCAN, "scan", 0, MPP, planes=3).replace('SamplesPerPixel="3"', ""))
    channels = [(np.ascontiguousarray(SCAN[..., c]), grey | (xml if c == 0 else {})) for c in range(3)]
    reduced = [(np.ascontiguousarray(SCAN[::2, ::2, c]), grey | {"subfiletype": 1}) for c in range(3)]
    with tifffile.TiffFile(pages(tmp_path / "a.ome.tif", *channels, *reduced)) as tiff:
        (scan, *_) = find_series(tiff)
        assert [len(level) for level in scan.levels] == [3]


def test_series_are_tifffiles(tmp_path: Path) -> None:
    """As many and as large, of images whose planes are many, in files where both know."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(np.stack([SCAN] * 3), **JPEG, metadata={"axes": "ZYXS", "Name": "a"})
        tiff.write(OTHER, **JPEG, metadata={"axes": "YXS", "Name": "b"})
        grey = {**LZW, "photometric": "minisblack"}
        tiff.write(np.stack([MACRO[..., 0]] * 4), **grey, metadata={"axes": "CYX", "Name": "c"})
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        found: list[Series] = find_series(tiff)
        assert [one.name for one in found] == [one.name for one in tiff.series]
        for mine, its in zip(found, tiff.series, strict=True):
            assert mine.size == (its.sizes["width"], its.sizes["height"])
            assert len(mine.levels[0]) == its.sizes.get("channel", 1)


def test_an_image_whose_planes_lie_in_another_file(tmp_path: Path) -> None:
    """It is no image of this one, whatever size it has."""
    here, there = "urn:uuid:1", "urn:uuid:2"
    data = '<TiffData IFD="0" PlaneCount="1"><UUID FileName="x.ome.tif">{}</UUID></TiffData></Pixels>'
    first = image_xml(SCAN, "there", None, 0.25).replace("</Pixels>", data.format(there))
    second = image_xml(SCAN, "here", None, MPP).replace("</Pixels>", data.format(here))
    xml = ome(first, second)["description"].replace("<OME ", f'<OME UUID="{here}" ')
    with open_slide(pages(tmp_path / "a.ome.tif", (SCAN, JPEG | {"description": xml}))) as reader:
        assert (reader.mpp, reader.picked) == ((MPP, MPP), Picked(1, "here", 1, None, named=False))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("code", "field"), [(256, 2), (257, 4), (258, 4), (277, 8), (322, 4), (324, 2), (325, 0)])
def test_a_damaged_directory_makes_no_slide_of_the_macro(tmp_path: Path, place: int, code: int, field: int) -> None:
    """Whose reader would take the first directory that it understands."""
    path = pages(tmp_path / "a.tif", (MACRO, LZW | {"subfiletype": 8}), (SCAN, LZW | microns(MPP)))
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[place].tags[code].offset
    overwrite(path, at + field, bytes([12, 0]) if field == 2 else bytes(4 if field else 2))
    try:
        with open_slide(path) as reader:
            found = reader.dimensions
    except SlideError:
        return
    assert found == (613, 521)


def test_what_is_said_of_a_damaged_directory(tmp_path: Path) -> None:
    path = pages(tmp_path / "a.tif", (MACRO, LZW | {"subfiletype": 8}), (SCAN, LZW | microns(MPP)))
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[1].tags[257].offset
    overwrite(path, at + 2, bytes([12, 0]))  # a height of type double
    with pytest.raises(SlideError, match=r"a\.tif: one of its 2 directories is damaged, .*; copy it again") as caught:
        open_slide(path)
    assert caught.value.reason == "unreadable"
