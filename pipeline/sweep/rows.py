"""Rows of predictions: one for each slide and scoring, in files that are only ever added.

`<root>/sweeps/rows/<scoring>/part-<digest>.parquet`, schema SWEEP_ROWS. A row is the commit of its slide under its
scoring. A file is written whole, under the name of its content, so that whatever is killed leaves whole rows or none,
and one that is written twice is one file.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DamagedError
from pipeline.ingest.tiler import TRANSIENT
from pipeline.schema import SWEEP_ROWS
from pipeline.storage.files import join, list_names, read_bytes, write_bytes

Row = dict[str, Any]
"""One of SWEEP_ROWS."""


class RowStore:
    """The rows below a root."""

    def __init__(self, root: str) -> None:
        self.uri = join(root, "rows")

    def add(self, rows: Iterable[Row]) -> None:
        """Commit rows, one file a scoring."""
        by_scoring: defaultdict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_scoring[row["scoring"]].append(row)
        for scoring, own in by_scoring.items():
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(own, SWEEP_ROWS), sink, compression="zstd")
            data = sink.getvalue()
            write_bytes(join(self.uri, scoring, f"part-{hashlib.sha256(data).hexdigest()[:16]}.parquet"), data)

    def read(self, scoring: str) -> pa.Table:
        """The rows of a scoring, each source once: a prediction before a failure, else what came last.

        Raises:
            DamagedError: a file cannot be read as rows.
        """
        folder = join(self.uri, scoring)
        tables = [_read(join(folder, name)) for name in list_names(folder) if name.endswith(".parquet")]
        table = pa.concat_tables([SWEEP_ROWS.empty_table(), *tables])
        failed = pc.is_valid(table["reason"])
        order = pc.sort_indices(
            table.append_column("failed", failed),
            sort_keys=[("source", "ascending"), ("failed", "ascending"), ("finished", "descending")],
        )
        ordered = table.take(order)
        names = ordered["source"].to_numpy(zero_copy_only=False)
        first = np.ones(len(names), np.bool_)
        first[1:] = names[1:] != names[:-1]
        return ordered.filter(pa.array(first))


def _read(uri: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(read_bytes(uri)), schema=SWEEP_ROWS)
    except pa.ArrowException as error:
        raise DamagedError(
            f"{uri}: cannot be read as rows of a sweep ({error}); remove it, and its slides are scored again"
        ) from error


def done_sources(table: pa.Table) -> set[str]:
    """Of rows that stand: predictions, and failures that would come again."""
    stands = [reason is None or reason not in TRANSIENT for reason in table["reason"].to_pylist()]
    return set(table["source"].filter(pa.array(stands, pa.bool_())).to_pylist())


def contents_of(tables: Mapping[str, pa.Table]) -> dict[str, set[str]]:
    """Source -> what its slide was found to be: keys and contents, over all scorings."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for table in tables.values():
        for source, key, content in zip(
            table["source"].to_pylist(), table["key"].to_pylist(), table["content"].to_pylist(), strict=True
        ):
            found[source] |= {name for name in (key, content) if name is not None}
    return dict(found)
