"""DICOM slides of a picture: one file a level, as scanners and converters write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

RGB = npt.NDArray[np.uint8]


def write_series(
    folder: Path, rgb: RGB, *, name: str = "slide", factors: Sequence[int] = (1, 4), mpp: float = 0.5, tile: int = 61
) -> list[Path]:
    """A series of uncompressed levels, full resolution first: 0.dcm, 1.dcm ..., in the folder, which is made.

    Args:
        folder: for the files.
        rgb: full resolution, of which level n has every px that `factors[n]` divides.
        name: of the slide; UIDs follow from it.
        factors: of the levels.
        mpp: microns per px at full resolution.
        tile: edge of a tile, px.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, factor in enumerate(factors):
        path = folder / f"{number}.dcm"
        level = rgb[::factor, ::factor]
        _level(level, name, number, factor, mpp * factor, (rgb.shape[1] * mpp, rgb.shape[0] * mpp), tile).save_as(
            path, enforce_file_format=True
        )
        paths.append(path)
    return paths


def uid(*parts: object) -> str:
    """One that follows from what it is of."""
    return str(generate_uid(entropy_srcs=["tests", *map(str, parts)]))


def _item(**values: object) -> Dataset:
    found = Dataset()
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found


def _code(value: str, scheme: str, meaning: str) -> list[Dataset]:
    return [_item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)]


def _level(
    rgb: RGB, name: str, number: int, factor: int, mpp: float, microns: tuple[float, float], tile: int
) -> Dataset:
    height, width = rgb.shape[:2]
    found = _item(
        ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        if factor == 1
        else ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"],
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        SOPInstanceUID=uid(name, number),
        StudyDate="20260102", ContentDate="20260102", AcquisitionDateTime="20260102030405",
        StudyTime="030405", ContentTime="030405",
        AccessionNumber="", Modality="SM", Manufacturer="tests", ManufacturerModelName="tests", DeviceSerialNumber="1",
        SoftwareVersions="1", ReferringPhysicianName="", PatientName="", PatientID="P-1", PatientBirthDate="",
        PatientSex="", VolumetricProperties="VOLUME", StudyInstanceUID=uid(name, "study"),
        SeriesInstanceUID=uid(name, "series"), StudyID="", SeriesNumber=1, InstanceNumber=number + 1,
        FrameOfReferenceUID=uid(name, "frame"), PositionReferenceIndicator="SLIDE_CORNER",
        DimensionOrganizationType="TILED_FULL",
        DimensionOrganizationSequence=[_item(DimensionOrganizationUID=uid(name, "dimensions"))],
        SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, Rows=tile, Columns=tile,
        BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, BurnedInAnnotation="NO",
        LossyImageCompression="00", ContainerIdentifier="C-1", IssuerOfTheContainerIdentifierSequence=[],
        ContainerTypeCodeSequence=_code("433466003", "SCT", "Microscope slide"), AcquisitionContextSequence=[],
        SpecimenDescriptionSequence=[
            _item(SpecimenIdentifier="S-1", SpecimenUID=uid(name, "specimen"), SpecimenPreparationSequence=[],
                  IssuerOfTheSpecimenIdentifierSequence=[])
        ],
        ImagedVolumeWidth=microns[0] / 1e3, ImagedVolumeHeight=microns[1] / 1e3, ImagedVolumeDepth=0.001,
        TotalPixelMatrixColumns=width, TotalPixelMatrixRows=height, TotalPixelMatrixFocalPlanes=1,
        TotalPixelMatrixOriginSequence=[
            _item(XOffsetInSlideCoordinateSystem=20.5, YOffsetInSlideCoordinateSystem=40.25)
        ],
        ImageOrientationSlide=[0, -1, 0, -1, 0, 0], SpecimenLabelInImage="NO", FocusMethod="AUTO",
        ExtendedDepthOfField="NO", NumberOfOpticalPaths=1,
        OpticalPathSequence=[
            _item(OpticalPathIdentifier="1",
                  IlluminationTypeCodeSequence=_code("111744", "DCM", "Brightfield illumination"),
                  IlluminationColorCodeSequence=_code("414298005", "SCT", "Full Spectrum"))
        ],
        SharedFunctionalGroupsSequence=[
            _item(
                PixelMeasuresSequence=[_item(PixelSpacing=[mpp / 1e3, mpp / 1e3], SliceThickness=0.001)],
                WholeSlideMicroscopyImageFrameTypeSequence=[_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])],
                OpticalPathIdentificationSequence=[_item(OpticalPathIdentifier="1")],
            )
        ],
    )  # fmt: skip
    tiles = _tiles(rgb, tile)
    found.NumberOfFrames, found.PixelData = len(tiles), b"".join(tiles) + bytes(sum(map(len, tiles)) % 2)
    found["PixelData"].VR = "OB"
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return found


def _tiles(rgb: RGB, tile: int) -> list[bytes]:
    """Row by row, the last ones filled up with white."""
    height, width = rgb.shape[:2]
    whole = np.full((-(-height // tile) * tile, -(-width // tile) * tile, 3), 255, np.uint8)
    whole[:height, :width] = rgb
    return [
        whole[y : y + tile, x : x + tile].tobytes()
        for y in range(0, len(whole), tile)
        for x in range(0, whole.shape[1], tile)
    ]
