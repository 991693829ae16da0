"""The feature store: one vector for each patch of a committed slide, committed like the patches.

`<root>/<spec fingerprint>-<encoder fingerprint>/<slide key>/` holds `part-00000-1f0c46d2a9b3.arrow` (uncompressed Arrow
IPC files of one record batch: row, feature; with the start of their sha256 in the name), `index.parquet` (schema INDEX,
as the patch store's: row, cell, x, y, level, and part, absolute offset and length of each vector) and `slide.json`,
which is written last; the catalogue beside the slides, as the patch store's, says which ones are committed. Vectors of
a part lie side by side, so a chunk is one range read and any row is one of exactly its bytes. Bytes follow from the
slide, the spec, the encoder and the kind of device. The index names the parts it leads to, and a second writer changes
nothing of a committed slide, so its features are those of one device.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.columnar import Columnar, mapped, together
from pipeline.config.embed import FEATURE_VERSION
from pipeline.errors import StorageError
from pipeline.schema import INDEX, PATCHES
from pipeline.storage import files
from pipeline.store.catalogue import Row
from pipeline.store.index import Ints, PatchIndex
from pipeline.store.packs import Place, SmallSlide, pack_uri, write_pack
from pipeline.store.parts import binaries, content_name, naming, parquet_bytes
from pipeline.store.patches import OnPatches, PatchStore, StoredSlide
from pipeline.store.rows import features_row
from pipeline.store.shelf import Shelf

PART_BYTES = 64 * 2**20

_ROW = ["n_patches", "dim", "dtype", "pack", "place"]

Features = npt.NDArray[np.floating[Any]]
"""float16 or float32."""
Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class FeatureSlide(OnPatches):
    """The features of a committed slide. Small, picklable; vectors and index are read when asked for."""

    uri: str
    """Folder of the slide in the feature store, or the pack that it is in."""
    encoder: str
    """Fingerprint."""
    dim: int
    dtype: Dtype
    place: Place | None = None
    """In the pack."""

    @property
    def key(self) -> str:
        """Names the content."""
        return f"{self.patches.key}-{self.encoder}"

    def index(self) -> PatchIndex:
        """Position of every patch, and place of its vector."""
        return self._vectors.index()

    def vectors(self, rows: Ints) -> Features:
        """(n, D) of `rows`, in their order.

        Raises:
            StorageError: the store cannot be read.
        """
        data = b"".join(self._vectors.payloads(rows))
        return np.frombuffer(data, self.dtype).reshape(len(rows), self.dim)

    def payloads(self, rows: Ints) -> list[bytes]:
        """The patches of `rows` as JPEGs."""
        return self.patches.payloads(rows)

    @property
    def _vectors(self) -> StoredSlide:
        """The same kind of index and range reads as the patch store's, over vectors."""
        return replace(self.patches, uri=self.uri, place=self.place)


class FeatureStore(Shelf):
    """The features of slides tiled with one spec, made by one encoder."""

    def __init__(self, root: str, spec_fingerprint: str, encoder_fingerprint: str) -> None:
        super().__init__(files.join(root, f"{spec_fingerprint}-{encoder_fingerprint}"))
        self.encoder = encoder_fingerprint

    def slides(self, stored: Sequence[StoredSlide]) -> Sequence[FeatureSlide]:
        """The committed features of committed slides.

        Raises:
            StorageError: some are not committed here, or belong to patches that are no longer there.
        """
        keys = [slide.key for slide in stored]
        self.require(dict.fromkeys(keys), "no committed features; run the embed stage")
        rows = self.view.slides.select(_ROW).take(self.view.slide_places(keys))
        slides = mapped(_Features(self.uri, self.encoder), together(stored, Columnar(rows, _row)))
        for _ in slides:
            pass  # those that do not fit are told here, not where they are trained on
        return slides

    def written(self, stored: StoredSlide) -> FeatureSlide | None:
        """A slide's features that are whole in their folder, committed or about to be; None without them.

        Raises:
            StorageError: they belong to patches that are no longer there.
        """
        facts = self.commit_of(stored.key)
        return None if facts is None else _Features(self.uri, self.encoder)((stored, facts))

    def write(self, stored: StoredSlide, chunks: Iterable[Features], facts: Mapping[str, Any]) -> FeatureSlide:
        """Write a slide's features, which `commit` makes seen; those of another writer that was faster are kept.

        Args:
            stored: the slide.
            chunks: (n, D) each, all rows in order.
            facts: of the encoder, for the record.

        Raises:
            StorageError: the store cannot be written.
        """
        uri = files.join(self.uri, stored.key)
        parts, places, dim, dtype, first = [], [], 0, "", 0
        for number, part in enumerate(_parts(chunks)):
            data, offsets = _part_bytes(part, first)
            name = content_name(number, hashlib.sha256(data).hexdigest())
            files.write_bytes(files.join(uri, name), data)
            parts.append(_file_facts(name, data, len(part)))
            places.append((number, offsets))
            first, dim, dtype = first + len(part), part.shape[1], part.dtype.name
        if first != stored.n_patches:
            raise StorageError(f"{stored.uri}: {first} of {stored.n_patches} patches gave features; tile it again")
        known = self.written(stored)
        if known is not None:  # another writer was faster, perhaps on another kind of device
            return known
        table = naming(_index(stored, places, dim * np.dtype(dtype).itemsize), [part["name"] for part in parts])
        index = parquet_bytes(table)
        files.write_bytes(files.join(uri, "index.parquet"), index)
        record = {
            "feature_version": FEATURE_VERSION,
            "key": stored.key,
            "patches": stored.uri,
            "n_patches": first,
            "dim": dim,
            "dtype": dtype,
            "encoder": dict(facts),
            "parts": parts,
            "index": _file_facts("index.parquet", index, first),
        }
        files.write_json(files.join(uri, "slide.json"), record)
        return _Features(self.uri, self.encoder)((stored, record))

    def rows(self, key: str) -> list[Row]:
        """What commits a slide's features, whose folder is whole (`append`)."""
        facts = self.commit_of(key)
        return [] if facts is None else [features_row(facts)]

    def pack(self, made: Sequence[tuple[StoredSlide, Features]], facts: Mapping[str, Any]) -> list[Row]:
        """Write the features of small slides into one pack; what commits them.

        A pack as of patches, with a vector's bytes in the place of a JPEG.

        Args:
            made: (N, D) of each slide.
            facts: of the encoder, for the record.

        Raises:
            StorageError: the store cannot be written.
        """
        slides = [_packed(stored, vectors, facts) for stored, vectors in made]
        pack = write_pack(slides)
        files.write_bytes(pack_uri(self.uri, pack.name), pack.data)
        return [features_row(slide.facts, pack.name, pack.places[slide.key].json()) for slide in slides]


def stored_slides(store: PatchStore, keys: Iterable[str]) -> list[StoredSlide]:
    """The committed slides of `keys`, each once, largest first: so no actor is left with a large one at the end."""
    slides = store.slides(list(dict.fromkeys(keys)))
    return sorted(slides, key=lambda slide: (-slide.n_patches, slide.key))


def _packed(stored: StoredSlide, vectors: Features, encoder: Mapping[str, Any]) -> SmallSlide:
    index = stored.index_table()
    columns = [index.column(field.name).combine_chunks() for field in PATCHES if field.name != "image"]
    patches = pa.record_batch([*columns, binaries([vector.tobytes() for vector in vectors])], schema=PATCHES)
    facts = {
        "feature_version": FEATURE_VERSION,
        "key": stored.key,
        "n_patches": len(vectors),
        "dim": vectors.shape[1],
        "dtype": vectors.dtype.name,
        "encoder": dict(encoder),
    }
    return SmallSlide(facts, patches, b"", b"")


@dataclass(frozen=True)
class _Features:
    """Makes a slide of that which its features were made of, and of what their commit says."""

    uri: str
    encoder: str

    def __call__(self, found: tuple[StoredSlide, Mapping[str, Any]]) -> FeatureSlide:
        stored, facts = found
        pack = facts.get("pack")
        uri = files.join(self.uri, stored.key) if pack is None else pack_uri(self.uri, pack)
        if facts["n_patches"] != stored.n_patches:
            raise StorageError(
                f"{uri}: features of {facts['n_patches']} patches, and the slide has {stored.n_patches}: it was tiled "
                "anew since; remove the folder and the embed stage's records (stages/embed-*.json), and run again"
            )
        place = None if pack is None else Place.of(facts["place"])
        return FeatureSlide(stored, uri, self.encoder, facts["dim"], facts["dtype"], place)


def _row(*values: Any) -> Mapping[str, Any]:
    return dict(zip(_ROW, values, strict=True))


def _parts(chunks: Iterable[Features]) -> Iterator[Features]:
    """Chunks joined to parts of up to 64 MiB, whatever the chunks' size."""
    held: list[Features] = []
    rows = 0
    for chunk in chunks:
        full = max(1, PART_BYTES // (chunk.shape[1] * chunk.itemsize))
        held, rows = [*held, chunk], rows + len(chunk)
        while rows >= full:
            joined = np.concatenate(held)
            yield joined[:full]
            held, rows = [joined[full:]], rows - full
    if rows:
        yield np.concatenate(held)


def _part_bytes(vectors: Features, first: int) -> tuple[bytes, Ints]:
    """An Arrow IPC file of the vectors of rows from `first`, and the absolute offset of each."""
    n, dim = vectors.shape
    values = pa.array(np.ascontiguousarray(vectors).ravel())
    batch = pa.record_batch(
        [pa.array(np.arange(first, first + n)), pa.FixedSizeListArray.from_arrays(values, dim)],
        names=["row", "feature"],
    )
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    buffer = pa.py_buffer(data)
    stored = pa.ipc.open_file(buffer).get_batch(0).column("feature").values.buffers()[1]
    return data, stored.address - buffer.address + np.arange(n) * dim * vectors.itemsize


def _index(stored: StoredSlide, places: list[tuple[int, Ints]], length: int) -> pa.Table:
    """The patch store's index with the vectors' places in it."""
    table = stored.index_table()
    columns = {
        "part": np.concatenate([np.full(len(offsets), number) for number, offsets in places]),
        "offset": np.concatenate([offsets for _, offsets in places]),
        "length": np.full(len(table), length),
    }
    for name, values in columns.items():
        field = INDEX.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


def _file_facts(name: str, data: bytes, rows: int) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "patches": rows}
