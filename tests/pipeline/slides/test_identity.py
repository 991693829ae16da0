"""What slide this is, by content."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SlideError, StorageError
from pipeline.formats import dicom
from pipeline.slides import identity
from pipeline.slides.identity import reading_source, slide_digest, slide_files, slide_version
from pipeline.storage import files
from pipeline.storage.staging import Staging
from tests.pipeline.formats.test_dicom import dicom_file, referenced
from tests.s3 import S3Server, serve_s3
from tests.synth import overwrite, tile_span, tissue_rgb, write_pyramid

SERIES = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tiff", tissue_rgb(1013, 787))


@pytest.fixture
def sampled(slide: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slide that counts as larger than what is hashed whole, with few samples."""
    monkeypatch.setattr(identity, "WHOLE", 1000)
    monkeypatch.setattr(identity, "EDGE", 500)
    monkeypatch.setattr(identity, "BLOCK", 50)
    monkeypatch.setattr(identity, "SAMPLES", 4)
    return slide


def test_name_and_place_do_not_matter(slide: Path, tmp_path: Path) -> None:
    other = tmp_path / "x" / "b c ä.svs"
    other.parent.mkdir()
    shutil.copy(slide, other)
    assert slide_digest(str(slide)) == slide_digest(str(other))
    assert len(slide_digest(str(slide)).sha256) == 64


def test_every_byte_of_a_small_file_counts(slide: Path) -> None:
    before = slide_digest(str(slide))
    offset, length = tile_span(slide, 0, 7)
    middle = offset + length // 2
    overwrite(slide, middle, bytes([slide.read_bytes()[middle] ^ 1]))
    assert slide_digest(str(slide)) != before


def test_a_large_slide_is_sampled(sampled: Path) -> None:
    before = slide_digest(str(sampled))
    offset, length = tile_span(sampled, 0, 3)  # of 20 tiles 0, 6, 12 and 19 are taken
    overwrite(sampled, offset + length // 2, b"unread")
    assert slide_digest(str(sampled)) == before


@pytest.mark.parametrize(("level", "tile"), [(0, 0), (0, 6), (0, 12), (0, 19), (1, 3), (2, 0)])
def test_the_first_and_last_and_evenly_spaced_tiles_count(sampled: Path, level: int, tile: int) -> None:
    before = slide_digest(str(sampled))
    offset, length = tile_span(sampled, level, tile)
    blocks = [offset + round(i * (length - 50) / 3) for i in range(4)]
    overwrite(sampled, blocks[1] + 10, b"changed")
    assert slide_digest(str(sampled)) != before


def test_tables_count_although_no_tile_changed(sampled: Path) -> None:
    before = slide_digest(str(sampled))
    data = sampled.read_bytes()
    _, length = tile_span(sampled, 0, 3)
    at = data.index(length.to_bytes(4, "little"), len(data) // 2)
    assert 500 < at < len(data) - 500  # in a table, not in the hashed edges
    overwrite(sampled, at, (length - 1).to_bytes(4, "little"))
    assert slide_digest(str(sampled)) != before


def test_a_large_slide_is_read_by_few_bytes(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = files.read_ranges

    def counted(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        read.append(sum(length for _, length in ranges))
        return original(uri, ranges)

    monkeypatch.setattr(files, "read_ranges", counted)
    slide_digest(str(sampled))
    assert sum(read) < 20_000 < sampled.stat().st_size / 8


@pytest.mark.parametrize("broken", [b"JUNK", b"II\x2a\x00\xff\xff\xff\x7f"])
def test_large_files_without_tiff_tables_are_sampled_too(sampled: Path, broken: bytes) -> None:
    overwrite(sampled, 0, broken)
    before = slide_digest(str(sampled))
    size = sampled.stat().st_size
    overwrite(sampled, round((size - 50) / 3) + 10, b"changed")
    assert slide_digest(str(sampled)) != before


def test_tiles_beyond_the_end_of_a_truncated_slide_are_left_out(sampled: Path) -> None:
    _, length = tile_span(sampled, 0, 19)
    data = sampled.read_bytes()
    at = data.index(length.to_bytes(4, "little"), len(data) // 2)
    overwrite(sampled, at, (400).to_bytes(4, "little"))
    offset, _ = tile_span(sampled, 0, 19)
    at = data.index(offset.to_bytes(4, "little"), len(data) // 2)
    overwrite(sampled, at, (len(data) - 10).to_bytes(4, "little"))
    assert len(slide_digest(str(sampled)).sha256) == 64


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 499), data=st.binary(min_size=1, max_size=8))
def test_a_large_slide_with_a_damaged_directory_has_a_digest(sampled: Path, place: int, data: bytes) -> None:
    sound = sampled.read_bytes()
    overwrite(sampled, len(sound) - 500 + place, data)
    try:
        assert len(slide_digest(str(sampled)).sha256) == 64
    finally:
        sampled.write_bytes(sound)


def test_a_large_slide_with_an_offset_too_few_is_sampled(sampled: Path) -> None:
    size = sampled.stat().st_size
    with tifffile.TiffFile(sampled) as tiff:
        tag = tiff.pages.first.tags[324]
    overwrite(sampled, tag.offset + 4, (tag.count - 1).to_bytes(4, "little"))
    before = slide_digest(str(sampled))
    overwrite(sampled, round((size - 50) / 3) + 10, b"changed")
    assert slide_digest(str(sampled)) != before


def test_mrxs_companions_count(tmp_path: Path) -> None:
    main, data = tmp_path / "a.mrxs", tmp_path / "a"
    main.write_bytes(b"preview")
    data.mkdir()
    (data / "Slidedat.ini").write_text("[GENERAL]")
    (data / "Data0000.dat").write_bytes(b"pixels")
    before = slide_digest(str(main))
    (data / "Data0000.dat").write_bytes(b"Pixels")
    assert slide_digest(str(main)) != before


def test_vms_companions_count_and_strangers_do_not(tmp_path: Path) -> None:
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile=a-0.jpg\nImageFile(0,1)=a-1.jpg\n")
    for name in ("a-0.jpg", "a-1.jpg", "other.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    before = slide_digest(str(tmp_path / "a.vms"))
    (tmp_path / "other.jpg").write_bytes(b"changed")
    assert slide_digest(str(tmp_path / "a.vms")) == before
    (tmp_path / "a-1.jpg").write_bytes(b"changed")
    assert slide_digest(str(tmp_path / "a.vms")) != before


def test_vms_companions_whose_names_hold_spaces_count(tmp_path: Path) -> None:
    """As the scanner names them, after date and time; of an operator with an umlaut."""
    name = "Jörg 1-40x - 2010-01-12 13.24.05"
    lines = [
        "[Virtual Microscope Specimen]", "NoLayers=1", f"ImageFile={name}.jpg", f"ImageFile(0,1)={name}(0,1).jpg",
        f"ImageFile(0,1,2) = {name}(0,1,2).jpg ", f"MapFile={name}_map2.jpg", f"OptimisationFile={name}.opt",
    ]  # fmt: skip
    (tmp_path / f"{name}.vms").write_text("\r\n".join([*lines, ""]))
    companions = sorted(name + end for end in ("(0,1).jpg", "(0,1,2).jpg", ".jpg", ".opt", "_map2.jpg"))
    for companion in (*companions, f"{name} other.jpg"):
        (tmp_path / companion).write_bytes(companion.encode())
    uri = str(tmp_path / f"{name}.vms")
    assert slide_files(uri) == [uri, *(str(tmp_path / companion) for companion in companions)]
    before = slide_digest(uri), slide_version(uri)
    (tmp_path / companions[0]).write_bytes(b"changed")
    assert slide_digest(uri) != before[0]
    assert slide_version(uri) != before[1]


@pytest.mark.parametrize("kind", ["mrxs", "vms", "dicom"])
def test_a_companion_that_is_a_link_to_nothing_is_an_error(kind: str, tmp_path: Path) -> None:
    write, _, companion = SEVERAL[kind]
    uri = str(write(tmp_path / "slide"))
    path = tmp_path / "slide" / companion
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    members = slide_files(uri)
    (tmp_path / "moved").unlink()
    assert str(path) in members
    for ask in (slide_files, slide_digest, slide_version):
        with pytest.raises(StorageError, match=f"{path.name}: it does not exist"):
            ask(uri)
    with pytest.raises(SlideError, match="does not exist"), reading_source():
        slide_version(uri)


def test_a_link_to_nothing_beside_a_vms_slide_is_none_of_it(tmp_path: Path) -> None:
    uri = str(write_vms(tmp_path / "slide"))
    before = slide_version(uri), slide_digest(uri)
    (tmp_path / "slide" / "stranger").symlink_to(tmp_path / "nowhere")
    assert (slide_version(uri), slide_digest(uri)) == before


def test_the_list_of_a_vms_slide_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = files.read_ranges

    def counted(uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        read.append(uri)
        return original(uri, ranges)

    monkeypatch.setattr(files, "read_ranges", counted)
    uri = str(write_vms(tmp_path / "x"))
    assert len(slide_files(uri)) == 3
    assert read == [uri]
    slide_version(uri)
    assert read == [uri, uri]


def test_dicom_files_of_one_series_are_one_slide(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(dicom_file(SERIES, b"level 0"))
    (tmp_path / "2.dcm").write_bytes(dicom_file(SERIES, b"level 1"))
    (tmp_path / "3.dcm").write_bytes(dicom_file(SERIES + "9", b"another slide"))
    one, two, other = (slide_digest(str(tmp_path / f"{i}.dcm")) for i in (1, 2, 3))
    assert one == two != other
    (tmp_path / "3.dcm").unlink()
    assert slide_digest(str(tmp_path / "1.dcm")) == one
    (tmp_path / "2.dcm").unlink()
    assert slide_digest(str(tmp_path / "1.dcm")) != one


def write_study(folder: Path, slides: int, parts: int) -> list[str]:
    """A folder with the files of several slides, 200 kB each; the first file of each."""
    folder.mkdir()
    for slide in range(slides):
        for number in range(parts):
            pixels = bytes([slide, number]) * 100_000
            (folder / f"{slide}-{number}.dcm").write_bytes(dicom_file(f"{SERIES}.{slide}", pixels))
    return [str(folder / f"{slide}-0.dcm") for slide in range(slides)]


def test_a_folder_of_many_dicom_slides_costs_a_short_head_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slides and threads ask; of its own files a slide reads all that its digest needs."""
    uris = write_study(tmp_path / "study", 6, 5)
    read: list[tuple[str, int]] = []
    original = files.read_ranges

    def counted(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        read.extend((uri, length) for _, length in ranges)
        time.sleep(0.002)  # as a storage would take, so that threads meet
        return original(uri, ranges)

    monkeypatch.setattr(files, "read_ranges", counted)
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(slide_version, uris))) == 6
    assert {length for _, length in read} == {dicom.WINDOW}
    assert 30 <= len(read) <= 36  # the main files' may be read by their own threads first
    read.clear()
    assert [len(slide_files(uri)) for uri in uris] == [5] * 6
    assert read == []
    assert slide_digest(uris[0]).whole
    sizes = {name: Path(name).stat().st_size for name in slide_files(uris[0])}
    assert dict(read) == sizes
    assert len(read) == 5


def test_a_change_to_another_dicom_slide_of_the_folder_is_none_of_this_one(tmp_path: Path) -> None:
    one, two, *_ = write_study(tmp_path / "study", 2, 2)
    before = slide_version(one), slide_version(two)
    (tmp_path / "study" / "1-2.dcm").write_bytes(dicom_file(SERIES + ".1", b"one more"))
    (tmp_path / "study" / "notes.dcm").write_text("no DICOM file")
    assert slide_version(one) == before[0]
    assert slide_version(two) != before[1]
    (tmp_path / "study" / "1-2.dcm").write_bytes(dicom_file(SERIES + ".0", b"of the other series now"))
    assert slide_version(one) != before[0]
    assert slide_version(two) == before[1]


def test_a_file_whose_header_names_another_series_first_belongs_to_its_own(tmp_path: Path) -> None:
    """A level that refers to the label's series, as its own element before its series."""
    (tmp_path / "0.dcm").write_bytes(dicom_file(SERIES, b"level 0"))
    (tmp_path / "1.dcm").write_bytes(dicom_file(SERIES, b"level 1", before=referenced("1.7")))
    assert slide_files(str(tmp_path / "0.dcm")) == [str(tmp_path / "0.dcm"), str(tmp_path / "1.dcm")]


def test_dicom_files_count_whatever_their_names(tmp_path: Path) -> None:
    names = ["0.dcm", "1.2.840.77", "IM0002", "level.3.DCM"]
    for name in names:
        (tmp_path / name).write_bytes(dicom_file(SERIES, name.encode()))
    (tmp_path / "notes.txt").write_text("no DICOM file" * 100)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    assert slide_files(str(tmp_path / "0.dcm")) == [str(tmp_path / name) for name in names]
    before = slide_digest(str(tmp_path / "0.dcm")), slide_version(str(tmp_path / "0.dcm"))
    (tmp_path / "1.2.840.77").write_bytes(dicom_file(SERIES, b"another level"))
    assert slide_digest(str(tmp_path / "0.dcm")) != before[0]
    assert slide_version(str(tmp_path / "0.dcm")) != before[1]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.svs"):
        slide_digest(str(tmp_path / "none.svs"))


def write_mrxs(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    (folder / "a.mrxs").write_bytes(b"preview")
    (folder / "a" / "Slidedat.ini").write_text("[GENERAL]")
    (folder / "a" / "Data0000.dat").write_bytes(b"pixels")
    return folder / "a.mrxs"


def write_vms(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile=a-0.jpg\nImageFile(0,1)=a-1.jpg\n")
    for name in ("a-0.jpg", "a-1.jpg", "other.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder / "a.vms"


def write_dicom(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "1.dcm").write_bytes(dicom_file(SERIES, b"level 0"))
    (folder / "2.dcm").write_bytes(dicom_file(SERIES, b"level 1"))
    (folder / "3.dcm").write_bytes(dicom_file(SERIES + "9", b"another slide"))
    return folder / "1.dcm"


SEVERAL: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "mrxs": (write_mrxs, ["a.mrxs", "a/Data0000.dat", "a/Slidedat.ini"], "a/Data0000.dat"),
    "vms": (write_vms, ["a.vms", "a-0.jpg", "a-1.jpg"], "a-1.jpg"),
    "dicom": (write_dicom, ["1.dcm", "2.dcm"], "2.dcm"),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_slide_of_several_files(
    kind: str, place: str, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are fetched to lie as they lay, have one version, and one digest wherever they are."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    write, names, companion = SEVERAL[kind]
    folder = server.folder / "bucket" / f"{kind} {place}"
    path = write(folder)
    base = f"s3://bucket/{kind} {place}" if place == "s3" else str(folder)
    uri = f"{base}/{path.name}"
    members = slide_files(uri)
    assert members == [f"{base}/{name}" for name in names]
    with Staging(str(tmp_path / "copies")).hold(uri, members) as copy:
        assert copy.name == path.name
        assert [(copy.parent / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]
        assert slide_digest(str(copy)) == slide_digest(uri) == slide_digest(str(path))
    before = slide_version(uri)
    assert before == slide_version(uri)
    assert before.size >= sum((folder / name).stat().st_size for name in names)
    data = (folder / companion).read_bytes()
    (folder / companion).write_bytes(data[::-1])
    os.utime(folder / companion, (1, 1))
    assert slide_version(uri) != before


def test_one_file_is_its_own_version(slide: Path) -> None:
    assert slide_version(str(slide)) == files.source_version(str(slide))
    assert slide_files(str(slide)) == [str(slide)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("bucket")
        yield server
