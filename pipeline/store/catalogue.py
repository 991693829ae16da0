"""What became of every source and every slide of one spec: rows in few files that any number of writers add to.

`<spec folder>/catalogue/<generation>-<sha256 of the file>.parquet` (schema CATALOGUE). A file is written once, whole,
by one task for all slides it did, **and is their commit**: a slide that no file names is not there, whatever lies in
the store. Nothing is renamed, replaced or locked, so any storage that lists what was written will do.

Three kinds of rows. A *source* says what one version of one file became: committed as `key`, or quarantined and why.
A *slide* says what is stored under `key` and where: in a folder of its own (`pack` is null), or in the pack of that
name, at `place` (JSON that only packs understand). A *removal* takes away the row of its id: of a slide that was
erased, is gone, or is not trusted.

The view is a function of the set of files alone, whatever the order in which they came, were merged or left behind by
killed writers: the union of all rows, without the removed ones. Ids are drawn, so a slide that comes back after its
removal is a row that no removal names. Of several rows for one source version a slide that is there beats a quarantine,
a verdict beats one that higher limits may overturn, higher limits beat lower ones; of several for one key the fewest
bad tiles win; then the lowest id.

Whoever finds `FAN` files of one generation or younger merges them: a file of the next generation, which names its
members. It holds all that they do, removals included, so that readers skip them and nothing changes while both are
there. Members are deleted once the merged file is `GRACE_S` old, when nobody who listed before it still reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby, islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.columnar import with_columns
from pipeline.errors import DamagedError, StorageError
from pipeline.schema import CATALOGUE, LOOK, SCHEMA_VERSION
from pipeline.storage import files
from pipeline.storage.tree import Found, walk

FOLDER = "catalogue"
FAN = 16  # files of a generation: of 1,500 groups some 20 files are read, 45 at most, and each row is merged 3 times
GRACE_S = 3600.0  # a look takes minutes at most
THREADS = 16  # they wait on the storage
AGAIN = 3  # looks at a catalogue of which a file went while it was read
BATCH = 8192  # rows of all columns held at a time: 20 MB
_NAME = re.compile(r"^(\d\d)-([0-9a-f]{32})\.parquet$")
_REPLACES, _SPEC = b"ips.replaces", b"ips.spec"
"""Keys of a file's metadata: names of the files merged to it, and of the folder that it was written for."""
Texts: TypeAlias = Collection[str | None] | pa.Array | pa.ChunkedArray
Row = Mapping[str, Any]
"""Columns of CATALOGUE but the id; absent ones are null."""


class View:
    """What the catalogue says at one moment."""

    def __init__(
        self, members: Mapping[str, frozenset[str]], rows: dict[str, list[pa.Table]], listed: Mapping[str, Found]
    ) -> None:
        self.members = members
        """Files that it was read from -> those that were merged to each."""
        self.listed = listed
        """All files that were there, by name; those that others replace too."""
        self.removed = pa.concat_tables(rows.pop("removal"))["id"].combine_chunks()
        """Ids that removals name."""
        slides, fewer = _left(pa.concat_tables(rows.pop("slide")), self.removed)
        merits = [slides["key"], slides["n_bad_tiles"]]
        columns = dict(zip(slides.column_names, slides.columns, strict=True))
        del slides  # each column goes when it is in order
        self._slides = _ordered(columns, merits)
        sources, others = _left(pa.concat_tables(rows.pop("source")), self.removed)
        self.holds_removed = fewer + others > 0 or self.members.keys() != listed.keys()
        """Whether files may hold rows that were taken away, as `Catalogue.purge` leaves none."""
        limits = [pc.negate(pc.fill_null(sources[name], np.inf)) for name in ("max_seconds", "max_gib")]
        merits = [sources["asked"], pc.cast(pc.is_null(sources["key"]), pa.int8()), *limits]
        columns = dict(zip(sources.column_names, sources.columns, strict=True))
        del sources
        self._sources = _ordered(columns, merits)
        pa.default_memory_pool().release_unused()  # of a million slides, hundreds of MB

    @cached_property
    def rows(self) -> pa.Table:
        """All slides and sources that were not removed, also those that others stand before; with their kind."""
        kinds = {"slide": self._slides, "source": self._sources}
        named = [rows.append_column("kind", pa.repeat(kind, len(rows))) for kind, rows in kinds.items()]
        return pa.concat_tables(named, promote_options="default")

    @cached_property
    def slides(self) -> pa.Table:
        """One row for each key, in their order."""
        return _firsts(self._slides, "key")

    @cached_property
    def sources(self) -> pa.Table:
        """One row for each version of a source that was asked for; those whose slide is not there are left out."""
        keys = self._sources["key"]
        there = pc.or_(pc.is_null(keys), pc.is_in(keys, value_set=self.slides["key"].combine_chunks()))
        return _firsts(self._sources if pc.all(there).as_py() else self._sources.filter(there), "asked")

    def slide_places(self, keys: Texts) -> pa.Array:
        """Where in `slides` each key stands; null where it does not."""
        return _places(keys, self.slides["key"])

    def source_places(self, asked: Texts) -> pa.Array:
        """Where in `sources` each digest of what is asked for stands; null where it does not."""
        return _places(asked, self.sources["asked"])

    def ids(self, kind: str, column: str, values: Collection[str]) -> list[bytes]:
        """Of all rows of a kind with one of these values, those included that others stand before."""
        chosen = pc.and_(
            pc.equal(self.rows["kind"], kind), pc.is_in(self.rows[column], value_set=pa.array(values, pa.string()))
        )
        found: list[bytes] = self.rows.filter(chosen)["id"].to_pylist()
        return found


class Catalogue:
    """The catalogue of one spec's folder."""

    def __init__(self, spec_uri: str) -> None:
        self.uri = files.join(spec_uri, FOLDER)
        self._spec = spec_uri.rstrip("/").rpartition("/")[2]

    def append(self, rows: Sequence[Row], instead_of: Sequence[bytes] = ()) -> None:
        """Commit these rows, all or none, and take away those of these ids with them."""
        tag = uuid.uuid4().bytes[:12]
        texts = ({name: _text(value) for name, value in row.items()} for row in rows)
        added = [{**row, "id": tag + number.to_bytes(4, "big")} for number, row in enumerate(texts)]
        self._add([*added, *({"id": one, "kind": "removal"} for one in instead_of)])

    def remove(self, ids: Sequence[bytes]) -> None:
        """Take away the rows of these ids, for ever."""
        self._add([{"id": one, "kind": "removal"} for one in ids])

    def read(self, without: Collection[str] = ()) -> View:
        """What all files say together, but those of these names.

        Raises:
            DamagedError: a file is cut short or was changed.
            StorageError: one is of a newer release, or the storage fails.
        """
        for _ in range(AGAIN):
            try:
                return self._read(without)
            except StorageError as error:  # merged since it was listed, by a machine whose clock is ahead
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        return self._read(without)

    def _read(self, without: Collection[str]) -> View:
        listed = {name: file for name, file in self._listed().items() if name not in without}
        members: dict[str, frozenset[str]] = {}
        rows = {kind: [schema.empty_table()] for kind, schema in LOOK.items()}
        for _, names in groupby(sorted(listed, reverse=True), key=_generation):
            replaced = frozenset().union(*members.values())
            wanted = [name for name in names if name not in replaced]
            for name, file in zip(wanted, self._opened(wanted), strict=True):
                members[name] = frozenset(json.loads(file.schema_arrow.metadata[_REPLACES]))
                _sort_out(file, rows)
        return View(members, rows, listed)

    def broken(self) -> dict[str, StorageError]:
        """Files that cannot be read, by name, and why."""

        def problem(name: str) -> StorageError | None:
            try:
                self._open(name)
            except StorageError as error:
                return error
            return None

        names = list(self._listed())
        with ThreadPoolExecutor(THREADS) as pool:
            return {name: error for name, error in zip(names, pool.map(problem, names), strict=True) if error}

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; what they alone said is lost."""
        for name in names:
            files.delete(files.join(self.uri, name))

    def purge(self, ids: Sequence[bytes]) -> None:
        """Take away rows so that no file holds them any more, nor any removed before. While nobody else is at work."""
        self.remove(ids)
        view = self.read()
        if view.members:
            names = sorted(view.members)
            merged = self._merge(view, names, max(1, _generation(names[-1])))  # a purge a day ends not at 99
            self.delete(view.listed.keys() - {merged})

    def wide(self, view: View, columns: Sequence[str], ids: pa.Array) -> Iterator[pa.Table]:
        """Any columns of some rows of a view, and their ids, some thousands at a time."""
        wanted = np.sort(_plain(ids))
        for rows in self._batches(list(view.members), ["id", "kind", *columns]) if len(ids) else ():
            found = _plain(rows["id"].combine_chunks())
            there = wanted[np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)] == found
            yield rows.filter(pc.and_(pa.array(there), pc.not_equal(rows["kind"], "removal")))

    def tidy(self, view: View, now: float | None = None) -> bool:
        """Merge the files of a view where they are many, and delete those that were merged long ago.

        Args:
            view: just read.
            now: s since 1970.

        Returns:
            Whether it merged any: another look then reads fewer.
        """
        before = (time.time() if now is None else now) - GRACE_S
        for name, replaces in view.members.items():
            if view.listed[name].modified < before:
                self.delete(replaces & view.listed.keys())
        active = sorted(view.members)
        for generation in range(_generation(active[-1]) + 1 if active else 0):
            young = [name for name in active if _generation(name) <= generation]
            if sum(_generation(name) == generation for name in young) >= FAN:
                self._merge(view, young, generation + 1)
                return True  # what is over in the generations above waits for the next time
        return False

    def _listed(self) -> dict[str, Found]:
        """Its files by name; not those of a copy that somebody put below it."""
        parts = ((file, file.uri.rpartition("/")) for file in walk(self.uri))
        return {name: file for file, (folder, _, name) in parts if folder.endswith(f"/{FOLDER}") and _NAME.match(name)}

    def _add(self, rows: Sequence[Row]) -> None:
        if rows:
            self._write(0, [pa.Table.from_pylist(rows, schema=CATALOGUE)], ())

    def _merge(self, view: View, names: Sequence[str], generation: int) -> str:
        """Write the rows of these files as one file, without those that they take away; its name."""
        replaces = set(names).union(*(view.members[name] for name in names)) & view.listed.keys()

        def rows() -> Iterator[pa.Table]:
            for batch in self._batches(names, CATALOGUE.names):
                removal = pc.equal(batch["kind"], "removal")
                yield batch.filter(pc.or_(removal, pc.invert(pc.is_in(batch["id"], value_set=view.removed))))

        return self._write(generation, rows(), sorted(replaces))

    def _write(self, generation: int, tables: Iterable[pa.Table], replaces: Sequence[str]) -> str:
        own = {_REPLACES: json.dumps(replaces).encode(), _SPEC: self._spec.encode()}
        metadata = {**CATALOGUE.metadata, **own}
        sink = pa.BufferOutputStream()
        schema = CATALOGUE.with_metadata(metadata)
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
        data = bytes(sink.getvalue())
        name = f"{generation:02d}-{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        files.write_bytes(files.join(self.uri, name), data)
        return name

    def _batches(self, names: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Rows of these files, in their order."""
        for file in self._opened(names):
            for batch in file.iter_batches(BATCH, columns=columns):
                yield with_columns(pa.Table.from_batches([batch]), CATALOGUE, columns)

    def _opened(self, names: Iterable[str]) -> Iterator[pq.ParquetFile]:
        """These files, some of which are fetched at a time; threads that decoded them would hold ten times as much."""
        rest = iter(names)
        with ThreadPoolExecutor(THREADS) as pool:
            while some := list(islice(rest, THREADS)):
                yield from pool.map(self._open, some)

    def _open(self, name: str) -> pq.ParquetFile:
        """A file's bytes, checked by its name."""
        uri = files.join(self.uri, name)
        data = files.read_bytes(uri)
        if hashlib.sha256(data).hexdigest()[:32] != name[3:35]:
            raise DamagedError(f"{uri}: is cut short or was changed; run `pipeline store repair`")
        file = pq.ParquetFile(pa.BufferReader(data))
        version = int(file.schema_arrow.metadata[b"ips.schema_version"])
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{uri}: was written by a newer release (layout {version}, this one knows {SCHEMA_VERSION}); update "
                "this one"
            )
        if (spec := file.schema_arrow.metadata[_SPEC].decode()) != self._spec:
            raise StorageError(
                f"{uri}: its slides were cut by another tiling spec ({spec}), so it was copied or renamed to here; "
                "remove the spec's folder and run again, which tiles the slides anew"
            )
        return file


def _sort_out(file: pq.ParquetFile, rows: Mapping[str, list[pa.Table]]) -> None:
    """Add a file's rows to those of their kinds."""
    columns = list(dict.fromkeys(["kind", *(name for schema in LOOK.values() for name in schema.names)]))
    for batch in file.iter_batches(BATCH, columns=columns):
        found = with_columns(pa.Table.from_batches([batch]), CATALOGUE, columns)
        for kind, schema in LOOK.items():
            rows[kind].append(found.filter(pc.equal(found["kind"], kind)).select(schema.names).cast(schema))
    pa.default_memory_pool().release_unused()


def _generation(name: str) -> int:
    """0: written by a task; else one more than that of the files that were merged."""
    return int(name[:2])


def _text(value: object) -> object:
    """Without halves of characters, which names of files may have, and Arrow has not."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _places(texts: Texts, column: pa.ChunkedArray) -> pa.Array:
    found = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
    return pc.index_in(found, value_set=column.combine_chunks())


def _plain(ids: pa.Array) -> npt.NDArray[np.bytes_]:
    """For each batch of rows Arrow would hash all ids anew."""
    return np.frombuffer(ids.buffers()[1], "S16", len(ids), 16 * ids.offset)


def _left(rows: pa.Table, removed: pa.Array) -> tuple[pa.Table, int]:
    """The rows that no removal names, and how many others there were."""
    left = rows.filter(pc.invert(pc.is_in(rows["id"], value_set=removed))) if len(removed) else rows
    return left, len(rows) - len(left)


def _ordered(columns: dict[str, pa.ChunkedArray], merits: Sequence[pa.ChunkedArray]) -> pa.Table:
    """Each row once, by the least merits and then by id; takes the columns away."""
    names = [str(number) for number in range(len(merits) + 1)]
    by = [(name, "ascending") for name in names]
    places = pc.sort_indices(pa.table([*merits, columns["id"]], names), by)
    return _firsts(pa.table({name: columns.pop(name).take(places) for name in list(columns)}), "id")


def _firsts(rows: pa.Table, column: str) -> pa.Table:
    """Of neighbours with one value in a column the first one."""
    values = rows[column].combine_chunks()
    if len(values) < 2:
        return rows
    other = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1))
    return rows if pc.all(other).as_py() else rows.filter(pa.concat_arrays([pa.array([True]), other]))
