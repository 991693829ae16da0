"""Many small objects of one kind as columns of an Arrow table: of a million they take a tenth of the memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

BATCH = 8192
"""Objects that are held at a time while all are made, or looked at."""

_DTYPES = {"int32": np.int32, "int64": np.int64, "double": np.float64}

Item = TypeVar("Item", covariant=True)
Other = TypeVar("Other")


class Columnar(Sequence[Item], Generic[Item]):
    """A sequence whose items are made when they are asked for; going through it costs less than asking by number.

    Args:
        table: a row an item.
        make: makes an item of a row's values. Picklable, where this is to be.
    """

    def __init__(self, table: pa.Table, make: Callable[..., Item]) -> None:
        self.table = table
        self._make = make

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], schema: pa.Schema, make: Callable[..., Item]) -> Columnar[Item]:
        """The items of these rows, which are taken one by one.

        Args:
            rows: values in the order of the schema; `make` takes them back.
            schema: of the table. Text may hold halves of characters, as names of files do, which Arrow's has not:
                such columns are binary then.
            make: see above.
        """
        rest, tables = iter(rows), list[pa.Table]()
        while some := list(islice(rest, BATCH)):
            columns = zip(*some, strict=True)
            arrays = [_array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            tables.append(pa.table(arrays, schema.names))
        if not tables:
            return cls(schema.empty_table(), make)
        return cls(joined(tables), make)

    def paired(self, others: Columnar[Other]) -> Columnar[tuple[Item, Other]]:
        """Each item with the other one at its place; nothing is copied."""
        columns = [*self.table.columns, *others.table.columns]
        names = [f"0.{name}" for name in self.table.column_names]  # Ray takes columns by name, so each has its own
        names += [f"1.{name}" for name in others.table.column_names]
        return Columnar(pa.table(columns, names=names), _Pair(self._make, others._make, self.table.num_columns))

    def map(self, make: Callable[[Item], Other]) -> Columnar[Other]:
        """What is made of each item, when it is asked for; `make` picklable, where this is to be."""
        return Columnar(self.table, _Then(self._make, make))

    def with_column(self, name: str, values: Sequence[Any]) -> Columnar[Item]:
        """The same with other values in one column."""
        place = self.table.schema.get_field_index(name)
        return Columnar(self.table.set_column(place, name, _array(values, self.table.schema.types[place])), self._make)

    def filter(self, mask: pa.ChunkedArray) -> Columnar[Item]:
        """Those for which the mask (a value an item) is true."""
        return Columnar(self.table.filter(mask), self._make)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step == 1:
                return Columnar(self.table.slice(start, max(0, stop - start)), self._make)
            return Columnar(self.table.take(pa.array(range(start, stop, step), pa.int64())), self._make)
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self._make(*(_read(column[place].as_py(), column.type) for column in self.table.columns))

    def __iter__(self) -> Iterator[Item]:
        for batch in self.table.to_batches(BATCH):
            yield from map(self._make, *map(_values, batch.columns))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __hash__(self) -> int:
        raise TypeError("a sequence of columns has no hash")

    def __repr__(self) -> str:
        return f"<{len(self)} items in columns {', '.join(self.table.column_names)}>"


@dataclass(frozen=True)
class _Pair:
    """Makes two items of the columns of both."""

    first: Callable[..., Any]
    second: Callable[..., Any]
    columns: int
    """Of the first."""

    def __call__(self, *values: Any) -> tuple[Any, Any]:
        return self.first(*values[: self.columns]), self.second(*values[self.columns :])


@dataclass(frozen=True)
class _Then:
    """Makes something of the item that is made of the columns."""

    first: Callable[..., Any]
    second: Callable[[Any], Any]

    def __call__(self, *values: Any) -> Any:
        return self.second(self.first(*values))


def together(ones: Sequence[Item], others: Sequence[Other]) -> Sequence[tuple[Item, Other]]:
    """Each with the other one at its place; columns, where both are."""
    if isinstance(ones, Columnar) and isinstance(others, Columnar):
        return ones.paired(others)
    return list(zip(ones, others, strict=True))


def mapped(make: Callable[[Item], Other], items: Sequence[Item]) -> Sequence[Other]:
    """What is made of each; columns, where these are."""
    return items.map(make) if isinstance(items, Columnar) else [make(item) for item in items]


def selected(items: Sequence[Item], mask: Sequence[bool]) -> Sequence[Item]:
    """Those for which the mask is true; columns, where these are."""
    return items.filter(pa.array(mask)) if isinstance(items, Columnar) else list(compress(items, mask))


def choose_allocator() -> None:
    """Have Arrow take jemalloc in this process, where it has it and nobody asked for another one.

    With its default, mimalloc, reading the catalogue of a million slides held 1,232 MB at most and 990 MB soon after,
    with jemalloc 958 and 764 (arrow 25, Linux).
    """
    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ and "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One after the other; a column that is binary in one of them is so in all."""
    return pa.concat_tables(tables, promote_options="permissive")


def texts(values: Sequence[str]) -> pa.Array:
    """Text as Arrow has it."""
    return _array(values, pa.string())


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """As `pa.array`, which loads pandas for a second where it is installed."""
    if pa.types.is_string(kind):
        try:
            data = [b"" if value is None else value.encode() for value in values]
        except UnicodeEncodeError:
            data = [b"" if value is None else value.encode("utf-8", "surrogatepass") for value in values]
            kind = pa.binary()
        offsets = np.concatenate([[0], np.cumsum(list(map(len, data)))]).astype(np.int32)
        buffers = [pa.py_buffer(offsets), pa.py_buffer(b"".join(data))]
    elif str(kind) in _DTYPES:
        buffers = [pa.py_buffer(np.array([0 if value is None else value for value in values], _DTYPES[str(kind)]))]
    else:
        return pa.array(values, kind)
    valid = np.array([value is not None for value in values])
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bits, *buffers])


def _values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return [_read(value, column.type) for value in values] if pa.types.is_binary(column.type) else values


def _read(value: Any, kind: pa.DataType) -> Any:
    return value.decode("utf-8", "surrogatepass") if pa.types.is_binary(kind) and value is not None else value


def with_columns(rows: pa.Table, schema: pa.Schema, names: Sequence[str]) -> pa.Table:
    """The rows with these columns of the schema, in this order; those that whoever wrote them did not know are null."""
    for name in names:
        if name not in rows.column_names:
            field = schema.field(name)
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows.select(names)
