"""A store of patches or features, opened: which slides there are, and their rows for other libraries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from html import escape
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.datasets.batch import Batch, Ints
from pipeline.datasets.slide import Slide, slide_of
from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.store.patches import APART, PatchStore, StoredSlide
from pipeline.store.shelf import Shelf
from pipeline.store.verify import spec_folders

if TYPE_CHECKING:
    import pyarrow.dataset
    import ray.data

    from pipeline.datasets.tensors import RowDataset

_LISTED = 20  # slides that are shown, and names that a message gives
_COMMON = ("key", "n_patches")
_OF_PATCHES = ("n_bad_tiles", "patch_px", "level", "downsample", "mpp", "context_mpp", "width", "height")
_OF_FEATURES = ("dim", "dtype")


def open_store(uri: str) -> Store:
    """Open a store for reading.

    Args:
        uri: `storage.patches` or `storage.features`, or the folder of one spec in it; also `storage.root`, of which it
            is the patches.

    Raises:
        StorageError: there is no store, one of several specs, or one of another release.
    """
    names = files.list_names(uri)
    place = files.join(uri, "patches") if "patches" in names and "stages" in names else uri
    specs = [spec for spec in spec_folders(files.absolute(place)) if spec.split("/")[-2] not in APART]
    if len(specs) != 1:
        found = "\n".join(f"  - {spec}: {len(Shelf(spec).view.slides)} slides" for spec in specs)
        raise StorageError(f"{uri}: {len(specs)} stores lie there; open one of them\n{found}")
    return Store(specs[0])


class Store:
    """The slides of one spec's folder, as they were when it was opened."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._shelf = Shelf(uri)
        self._shelf.view  # noqa: B018, what is damaged is told now

    @property
    def kind(self) -> str:
        """What it holds: patches or features."""
        return "features" if "-" in self.uri.rpartition("/")[2] else "patches"

    @cached_property
    def slides(self) -> pa.Table:
        """One row a slide, by key: n_patches, `sources` (URIs of the files that became it), and what is known of all.

        Of patches: n_bad_tiles, patch_px, level, downsample, mpp, context_mpp, width and height (level-0 px). Of
        features: dim and dtype.
        """
        rows = self._shelf.view.slides
        table = rows.select([*_COMMON, *(_OF_PATCHES if self.kind == "patches" else _OF_FEATURES)])
        sources = [list(self._sources[key]) for key in rows["key"].to_pylist()]
        return table.append_column("sources", pa.array(sources, pa.list_(pa.string())))

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        table = self._shelf.view.sources
        for row in table.filter(pc.is_valid(table["key"])).select(["key", "uri"]).to_pylist():
            if row["uri"] not in found[row["key"]]:  # another version of the file had the same content
                found[row["key"]].append(row["uri"])
        return found

    def __len__(self) -> int:
        return len(self._shelf.view.slides)

    def __iter__(self) -> Iterator[Slide]:
        for batch in self._shelf.view.slides.to_batches(8192):
            for row in batch.to_pylist():
                yield slide_of(self.uri, row, self._sources[row["key"]])

    def __getitem__(self, name: str) -> Slide:
        """A slide by its key or the beginning of it, or by the URI, the name or the stem of its file.

        Raises:
            StorageError: no slide, or several, have this name.
        """
        keys = self._shelf.view.slides["key"].to_pylist()
        found = [name] if name in self._sources or name in keys else [key for key in keys if self._is_named(key, name)]
        if len(found) != 1:
            told = ", ".join(found[:_LISTED]) or "none of " + ", ".join(keys[:_LISTED])
            raise StorageError(f"{self.uri}: {len(found)} slides are called {name!r} ({told}); name one by its key")
        (row,) = self._shelf.view.slides.take(self._shelf.view.slide_places(found)).to_pylist()
        return slide_of(self.uri, row, self._sources[row["key"]])

    def _is_named(self, key: str, name: str) -> bool:
        paths = [(uri, PurePosixPath(uri)) for uri in self._sources[key]]
        return key.startswith(name) or any(name in (uri, path.name, path.stem) for uri, path in paths)

    def stored(self, name: str) -> StoredSlide:
        """A slide with its pictures: `thumbnail`, `mask` and `outline`; only of patches. Errors as of `store[name]`."""
        if self.kind != "patches":
            raise StorageError(f"{self.uri}: features have no pictures; open the store of patches")
        root, _, spec = self.uri.rpartition("/")
        return PatchStore(root, spec).slide(self[name].key)

    def sample(self, n: int, seed: int = 0) -> Batch:
        """Some of all rows at random, none twice, in the order of slides and rows; all where there are fewer."""
        ends = np.cumsum(self._shelf.view.slides["n_patches"].to_numpy())
        total = int(ends[-1]) if len(ends) else 0
        if not total:
            raise StorageError(f"{self.uri}: holds no rows to draw from")
        drawn = np.random.default_rng(seed).choice(total, min(n, total), replace=False)
        return self._read(np.sort(drawn), ends)

    def _read(self, drawn: Ints, ends: Ints) -> Batch:
        """Rows by their number in the whole store, ascending."""
        owners = np.searchsorted(ends, drawn, side="right")
        numbers = np.unique(owners)
        starts = ends - self._shelf.view.slides["n_patches"].to_numpy()
        rows = self._shelf.view.slides.take(pa.array(numbers)).to_pylist()
        parts = [
            slide_of(self.uri, row, ()).read(drawn[owners == number] - starts[number])
            for number, row in zip(numbers.tolist(), rows, strict=True)
        ]
        arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "x", "y", "data"))
        return Batch(tuple(key for part in parts for key in part.keys), *arrays)

    def torch(self, slides: Sequence[Slide] | None = None, transform: Callable[[Any], Any] | None = None) -> RowDataset:
        """A `torch.utils.data.Dataset` of the rows of these slides, all by default; see `RowDataset`."""
        from pipeline.datasets.tensors import RowDataset

        return RowDataset(list(self) if slides is None else slides, transform)

    def ray(self, slides: Sequence[Slide] | None = None) -> ray.data.Dataset:
        """A `ray.data.Dataset`: key, row, x, y and image (JPEG) or feature; read by tasks of some hundred rows.

        In the Ray that this process is connected to, else in one that Ray starts here.
        """
        from pipeline.datasets.blocks import ray_dataset

        return ray_dataset(list(self) if slides is None else slides)

    def arrow(self, slides: Sequence[Slide] | None = None) -> pyarrow.dataset.Dataset:
        """A `pyarrow.dataset.Dataset`: key, and the columns of the parts (`pipeline/store/README.md`).

        A filter by key opens no other slide's files; nothing is read before it is scanned. DuckDB and Polars take it
        as a table.
        """
        from pipeline.datasets.arrow import arrow_dataset

        return arrow_dataset(list(self) if slides is None else slides)

    def _repr_html_(self) -> str:
        total = pc.sum(self.slides["n_patches"]).as_py() or 0
        head = self.slides.slice(0, _LISTED)
        names = "".join(f"<th>{escape(name)}</th>" for name in head.column_names)
        cells = ("".join(f"<td>{escape(_shown(value))}</td>" for value in row.values()) for row in head.to_pylist())
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        more = f"<p>and {len(self) - _LISTED} more</p>" if len(self) > _LISTED else ""
        return (
            f"<div><p>{len(self)} slides, {total} {self.kind}: {escape(self.uri)}</p>"
            f"<table><tr>{names}</tr>{rows}</table>{more}</div>"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(PurePosixPath(item).name for item in value)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
