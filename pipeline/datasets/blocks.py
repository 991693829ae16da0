"""The rows of slides as a dataset of Ray Data: tasks that read some hundred neighbours each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray.data

from pipeline.datasets.slide import Slide
from pipeline.errors import StorageError
from pipeline.store.index import read_rows, slide_index
from pipeline.store.packs import Place

ROWS = 256  # of a task: 4 to 15 MB of 256 px patches
TASKS = 1024  # at most to begin with; further portions follow in the same tasks


def ray_dataset(slides: Sequence[Slide]) -> ray.data.Dataset:
    """Columns key, row, x, y, and image (large_binary, a JPEG) or feature (a list of D floats); in no fixed order.

    Raises:
        StorageError: there are no slides.
    """
    portions = [
        {**_reference(slide), "start": start, "stop": min(start + ROWS, slide.n_patches)}
        for slide in slides
        for start in range(0, slide.n_patches, ROWS)
    ]
    if not portions:
        raise StorageError("no slides with patches were given; see `store.slides`")
    listed = ray.data.from_items(portions, override_num_blocks=min(TASKS, len(portions)))
    return listed.map_batches(_read, batch_size=1, batch_format="pyarrow")


def _reference(slide: Slide) -> dict[str, object]:
    """What a task needs of a slide, in columns."""
    place = "" if slide.place is None else slide.place.json()
    return {
        "key": slide.key,
        "uri": slide.uri,
        "place": place,
        "n": slide.n_patches,
        "dim": slide.dim or 0,
        "dtype": slide.dtype or "",
    }


def _read(portion: pa.Table) -> pa.Table:
    (row,) = portion.to_pylist()
    place = Place.of(row["place"]) if row["place"] else None
    rows = np.arange(row["start"], row["stop"])
    payloads = read_rows(row["uri"], place, row["n"], rows)
    index = slide_index(row["uri"], place, row["n"])
    columns = {"key": pa.repeat(row["key"], len(rows)), "row": rows, "x": index.x[rows], "y": index.y[rows]}
    if not row["dim"]:
        return pa.table({**columns, "image": pa.array(payloads, pa.large_binary())})
    values = pa.array(np.frombuffer(b"".join(payloads), row["dtype"]))
    return pa.table({**columns, "feature": pa.FixedSizeListArray.from_arrays(values, row["dim"])})
