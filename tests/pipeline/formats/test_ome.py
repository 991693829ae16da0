"""What the OME-XML says, without a file."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from pipeline.formats.ome import Channel, Length, Plane, TiffData, parse_ome

HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="u:1">'
)
TWO = (
    HEAD
    + '<Image ID="Image:0" Name="label"><Pixels DimensionOrder="XYCZT" Type="uint8" SizeX="160" SizeY="61" SizeZ="1" '
    'SizeC="3" SizeT="1"><Channel ID="c" SamplesPerPixel="3"/><TiffData IFD="7" PlaneCount="1"/></Pixels></Image>'
    '<Image ID="Image:1" Name="scan"><Pixels DimensionOrder="XYZCT" Type="uint8" SizeX="313" SizeY="271" SizeZ="3" '
    'SizeC="2" SizeT="1" PhysicalSizeX="0.25" PhysicalSizeXUnit="mm" PhysicalSizeY="0.5">'
    '<Channel ID="d" Name="DAPI"/><Channel ID="e" Name="CD3"/>{}</Pixels></Image></OME>'
)


def test_images_in_the_order_of_the_xml() -> None:
    ome = parse_ome(TWO.format('<TiffData IFD="0" PlaneCount="6"/>'))
    label, scan = ome.images
    assert (ome.uuid, label.name, scan.name) == ("u:1", "label", "scan")
    assert label.sizes == {"X": 160, "Y": 61, "Z": 1, "C": 3, "T": 1}
    assert label.counts == {"Z": 1, "C": 1, "T": 1}
    assert label.channels == (Channel("", 3),)
    assert label.physical == (None, None)
    assert label.tiff_data == (TiffData(7, 1, {"Z": 0, "C": 0, "T": 0}, None),)
    assert scan.counts == {"Z": 3, "C": 2, "T": 1}
    assert scan.physical == (Length(0.25, "mm"), Length(0.5, "µm"))
    assert scan.channels == (Channel("DAPI", 1), Channel("CD3", 1))


@pytest.mark.parametrize(
    ("tiff_data", "expected"),
    [
        ('<TiffData IFD="2" PlaneCount="4"/>', {2: (0, 0, 0), 3: (1, 0, 0), 4: (2, 0, 0), 5: (0, 1, 0)}),
        ("<TiffData/>", {0: (0, 0, 0), 1: (1, 0, 0), 2: (2, 0, 0), 3: (0, 1, 0), 4: (1, 1, 0), 5: (2, 1, 0)}),
        ('<TiffData IFD="3"/>', {3: (0, 0, 0)}),
        ('<TiffData IFD="3" NumPlanes="2" FirstZ="2"/>', {3: (2, 0, 0), 4: (0, 1, 0)}),
        ('<TiffData IFD="1" FirstC="1" FirstZ="1"/><TiffData IFD="4"/>', {1: (1, 1, 0), 4: (0, 0, 0)}),
        ('<TiffData IFD="1"><UUID FileName="a.tif">u:1</UUID></TiffData>', {1: (0, 0, 0)}),
        ('<TiffData IFD="1"><UUID FileName="b.tif">u:2</UUID></TiffData>', {}),
        ('<TiffData IFD="6" PlaneCount="999999999999"/>', {6: (0, 0, 0), 7: (1, 0, 0)}),
        ("", {}),
    ],
)
def test_directories_of_the_planes(tiff_data: str, expected: dict[int, tuple[int, int, int]]) -> None:
    scan = parse_ome(TWO.format(tiff_data)).images[1]
    assert scan.planes("u:1", 8) == {ifd: Plane(*plane) for ifd, plane in expected.items()}


def test_sizes_of_px_that_are_none() -> None:
    for text in ("0", "-1", "nan", "inf", "", "half"):
        xml = TWO.format("").replace('PhysicalSizeX="0.25"', f'PhysicalSizeX="{text}"')
        assert parse_ome(xml).images[1].physical == (None, Length(0.5, "µm"))


def test_what_is_no_ome_xml() -> None:
    with pytest.raises(ElementTree.ParseError):
        parse_ome("<OME")
    for wrong in (('SizeX="313"', 'SizeX="wide"'), ('IFD="7"', 'IFD="-7"'), ("XYCZT", "XXXXX")):
        with pytest.raises(ValueError, match=r"wide|IFD|XXXXX"):
            parse_ome(TWO.format("").replace(*wrong))


@pytest.mark.parametrize(
    ("unit", "microns"),
    [
        ("\u00b5m", 0.5),
        ("\u03bcm", 0.5),
        ("um", 0.5),
        ("micron", 0.5),
        ("nm", 0.0005),
        ("pm", 5e-7),
        ("mm", 500.0),
        ("cm", 5000.0),
        ("m", 500_000.0),
        ("in", 12_700.0),
        ("inch", 12_700.0),
        ("\u00c5", 5e-5),
        ("\u212b", 5e-5),
        (" nm ", 0.0005),
        ("pixel", None),
        ("reference frame", None),
        ("Mm", None),
        ("", None),
    ],
)
def test_units(unit: str, microns: float | None) -> None:
    found = Length(0.5, unit).microns
    assert found == (None if microns is None else pytest.approx(microns))


@pytest.mark.parametrize(
    ("stated", "colour"),
    [("-16776961", 0xFF0000FF), ("16711935", 0x00FF00FF), ("65535", 0x0000FFFF), ("", None), ("red", None)],
)
def test_colours_of_channels_are_signed_numbers(stated: str, colour: int | None) -> None:
    xml = TWO.format("").replace('Name="CD3"', f'Name="CD3" Color="{stated}"')
    assert parse_ome(xml).images[1].channels == (Channel("DAPI", 1), Channel("CD3", 1, colour))
