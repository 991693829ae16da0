from __future__ import annotations

import random

import pytest

from pipeline.formats.dicom import MAX_WINDOWS, PREAMBLE, WINDOW, read_head

SERIES = "1.2.826.0.1.3680043.8.498.1"
_LONG = ("SQ", "OB", "UN")
_ITEM = b"\xfe\xff\x00\xe0"
_ITEM_END, _SEQUENCE_END = b"\xfe\xff\x0d\xe0" + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)


def element(group: int, number: int, vr: str, value: bytes, *, length: int | None = None) -> bytes:
    """In explicit little endian; `length` None is that of the value."""
    value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    size = len(value) if length is None else length
    head = group.to_bytes(2, "little") + number.to_bytes(2, "little") + vr.encode()
    return head + (bytes(2) + size.to_bytes(4, "little") if vr in _LONG else size.to_bytes(2, "little")) + value


def implicit(group: int, number: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return group.to_bytes(2, "little") + number.to_bytes(2, "little") + len(value).to_bytes(4, "little") + value


def referenced(uid: str) -> bytes:
    """ReferencedSeriesSequence, which stands before the file's own series."""
    item = element(0x0008, 0x114A, "SQ", b"") + element(0x0020, 0x000E, "UI", uid.encode())
    return element(0x0008, 0x1115, "SQ", _ITEM + len(item).to_bytes(4, "little") + item)


def open_ended(*, item_too: bool, vr: str = "SQ", inside: bytes | None = None) -> bytes:
    """The same without lengths, in a sequence alone or in its items too."""
    inside = element(0x0020, 0x000E, "UI", b"1.7") if inside is None else inside
    item = _ITEM + b"\xff" * 4 + inside + _ITEM_END if item_too else _ITEM + len(inside).to_bytes(4, "little") + inside
    return element(0x0008, 0x1115, vr, item + _SEQUENCE_END, length=0xFFFFFFFF)


def dicom_file(uid: str, pixels: bytes, before: bytes = b"", syntax: str | None = "1.2.840.10008.1.2.1") -> bytes:
    """A DICOM file; `before` are elements ahead of its series."""
    meta = b"" if syntax is None else element(0x0002, 0x0010, "UI", syntax.encode())
    series = element(0x0020, 0x000D, "UI", b"1.2.3") + element(0x0020, 0x000E, "UI", uid.encode())
    return bytes(PREAMBLE - 4) + b"DICM" + meta + before + series + element(0x7FE0, 0x0010, "OB", pixels)


def found(data: bytes, reads: list[int] | None = None) -> bytes | None:
    def read(start: int, length: int) -> bytes:
        if reads is not None:
            reads.append(length)
        return data[start : start + length]

    head = read_head(read)
    return None if head is None else head.series


@pytest.mark.parametrize(
    "before",
    [
        b"",
        referenced("1.7"),
        open_ended(item_too=False),
        open_ended(item_too=True),
        open_ended(item_too=True, inside=open_ended(item_too=True) + element(0x0020, 0x000E, "UI", b"1.8")),
        open_ended(item_too=True, vr="UN", inside=implicit(0x0020, 0x000E, b"1.9")),
        element(0x0009, 0x1010, "OB", element(0x0020, 0x000E, "UI", b"1.7")),
    ],
)
def test_the_series_is_the_data_set_s_own(before: bytes) -> None:
    assert found(dicom_file(SERIES, b"pixels", before)) == SERIES.encode()


@pytest.mark.parametrize(
    ("kind", "image", "expected"),
    [
        ("77.1.6", r"ORIGINAL\PRIMARY\VOLUME\NONE", (True, True, False)),
        ("77.1.6", r"DERIVED\PRIMARY\VOLUME\RESAMPLED ", (True, False, True)),
        ("77.1.6", r"DERIVED\PRIMARY\THUMBNAIL\RESAMPLED", (True, False, False)),
        ("77.1.6", r"ORIGINAL\PRIMARY\LABEL\NONE", (True, False, False)),
        ("77.1.6", "", (True, True, False)),
        ("30", r"DERIVED\PRIMARY\VOLUME\RESAMPLED", (False, False, False)),
    ],
)
def test_what_a_file_is_of_a_slide(kind: str, image: str, expected: tuple[bool, bool, bool]) -> None:
    own = element(0x0008, 0x0008, "CS", image.encode()) if image else b""
    own += element(0x0008, 0x0016, "UI", f"1.2.840.10008.5.1.4.1.1.{kind}".encode())
    data = dicom_file(SERIES, b"pixels", own + referenced("1.7"))
    head = read_head(lambda start, length: data[start : start + length])
    assert head is not None
    assert (head.series, head.study) == (SERIES.encode(), b"1.2.3")
    assert (head.is_slide, head.is_full, head.is_reduced) == expected


def test_implicit_files_are_read_and_others_are_not_guessed_at() -> None:
    meta = element(0x0002, 0x0010, "UI", b"1.2.840.10008.1.2")
    nested = implicit(0x0020, 0x000E, b"1.7")
    sequence = implicit(0x0008, 0x1115, _ITEM + len(nested).to_bytes(4, "little") + nested)
    data = bytes(PREAMBLE - 4) + b"DICM" + meta + sequence + implicit(0x0020, 0x000E, SERIES.encode())
    assert found(data) == SERIES.encode()
    for syntax in ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"):
        assert found(dicom_file(SERIES, b"", syntax=syntax)) is None


@pytest.mark.parametrize("size", [WINDOW - 190, WINDOW - 150, 500_000, 40_000_000])
def test_a_long_header_costs_a_window_more(size: int) -> None:
    """The UID lies across the end of the first read, or far behind it."""
    reads: list[int] = []
    assert (
        found(dicom_file(SERIES, bytes(100_000), element(0x0009, 0x1010, "OB", bytes(size))), reads) == SERIES.encode()
    )
    assert reads in ([WINDOW], [WINDOW, WINDOW])


def test_a_header_without_lengths_is_read_up_to_a_limit() -> None:
    reference = _ITEM + b"\xff" * 4 + element(0x0020, 0x000E, "UI", b"1.7") + _ITEM_END
    for count, expected in ((20_000, SERIES.encode()), (200_000, None)):
        reads: list[int] = []
        sequence = element(0x0008, 0x1115, "SQ", reference * count + _SEQUENCE_END, length=0xFFFFFFFF)
        assert found(dicom_file(SERIES, b"", sequence), reads) == expected
        assert len(reads) <= MAX_WINDOWS


def test_what_is_no_dicom_file_has_no_series() -> None:
    assert found(b"") is None
    assert found(b"II*\0" + bytes(1000)) is None
    assert found(element(0x0020, 0x000E, "UI", SERIES.encode())) is None
    directory = element(0x0004, 0x1220, "SQ", _ITEM + b"\xff" * 4 + element(0x0020, 0x000E, "UI", b"1.7"))
    assert found(bytes(PREAMBLE - 4) + b"DICM" + directory + element(0x0028, 0x0010, "US", b"\1\0")) is None


def test_a_damaged_header_ends() -> None:
    sound = bytearray(dicom_file(SERIES, bytes(300), referenced("1.7") + open_ended(item_too=True)))
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(3):
            damaged[generator.randrange(PREAMBLE, len(sound))] = generator.randrange(256)
        found(bytes(damaged[: generator.randrange(len(sound))]))
