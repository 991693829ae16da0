"""The rows of slides as a dataset of Arrow: parts are read where they lie, a packed slide as a file of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.datasets.slide import Slide
from pipeline.errors import StorageError
from pipeline.schema import PATCHES
from pipeline.storage import files
from pipeline.storage.ranges import SourceFile
from pipeline.store.packs import Place, read_index
from pipeline.store.parts import binaries

_FORMAT = ds.IpcFileFormat()


def arrow_dataset(slides: Sequence[Slide]) -> ds.Dataset:
    """Fragments know the key of their slide, so that a filter by key opens no others.

    Columns: key, then those of a part: of patches cell, x, y, level, image; of features row, feature.

    Raises:
        StorageError: there are no slides, or a slide is not there any more.
    """
    if not slides:
        raise StorageError("no slides were given; see `store.slides`")
    schema = _schema(slides[0])
    fragments = [fragment for slide in slides for fragment in _fragments(slide)]
    return ds.FileSystemDataset(fragments, pa.schema([pa.field("key", pa.string()), *schema]), _FORMAT)


def _schema(slide: Slide) -> pa.Schema:
    if slide.dim is None:
        return pa.schema(list(PATCHES))
    number = pa.from_numpy_dtype(np.dtype(str(slide.dtype)))
    return pa.schema([pa.field("row", pa.int64()), pa.field("feature", pa.list_(number, slide.dim))])


def _fragments(slide: Slide) -> Iterator[ds.Fragment]:
    key = ds.field("key") == slide.key
    if slide.place is None:
        for part in slide.facts()["parts"]:
            uri = files.join(slide.uri, part["name"])
            yield _FORMAT.make_fragment(_Part(uri, part["bytes"]), partition_expression=key)
    else:
        yield _FORMAT.make_fragment(_Packed(slide), partition_expression=key)


class _Part(SourceFile):
    """A part, by range."""

    def __init__(self, uri: str, size: int) -> None:
        super().__init__(size, lambda wanted: files.read_ranges(uri, [wanted])[0])


class _Packed(io.RawIOBase):
    """A packed slide as a part of its own, made when it is read and held by nobody for long."""

    def __init__(self, slide: Slide) -> None:
        self._slide, self._at = slide, 0

    def _data(self) -> bytes:
        assert self._slide.place is not None
        return _file(self._slide, self._slide.place)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as in any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = offset + (len(self._data()) if base is None else base)
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, as far as the file reaches."""
        data = self._data()[self._at : self._at + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@lru_cache(maxsize=16)  # slides: as many are scanned at a time, of at most some MB each
def _file(slide: Slide, place: Place) -> bytes:
    """An Arrow IPC file of a packed slide, with the columns of a part."""
    payloads = slide.payloads(np.arange(slide.n_patches))
    if slide.dim is None:
        cells, x, y = read_index(slide.uri, place, slide.n_patches)[:, :3].astype(np.int64).T
        arrays = [pa.array(column) for column in (cells, x, y)]
        arrays.append(pa.array(np.full(slide.n_patches, slide.level, np.int32)))
        batch = pa.record_batch([*arrays, binaries(payloads)], schema=pa.schema(list(PATCHES)))
    else:
        values = pa.array(np.frombuffer(b"".join(payloads), str(slide.dtype)))
        arrays = [pa.array(np.arange(slide.n_patches)), pa.FixedSizeListArray.from_arrays(values, slide.dim)]
        batch = pa.record_batch(arrays, schema=_schema(slide))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()
