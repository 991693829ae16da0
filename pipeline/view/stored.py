"""A patch store to look at: its slides, where tissue is and which patches are stored."""

from __future__ import annotations

import numpy as np

from pipeline.slides.folders import SUFFIX, is_folder
from pipeline.slides.names import apart, name_of
from pipeline.storage import files
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.verify import spec_folders
from pipeline.tiling.evidence import read_mask_png
from pipeline.view.rasters import Mask, Squares
from pipeline.view.shown import Batch, Patches, ShownSlide


class Stored(Batch):
    """The slides of all specs of a store, or of one; of each file what it became last."""

    def __init__(self, store: str) -> None:
        """Raises StorageError where no store is there."""
        self.name, self.scales = files.absolute(store), {}
        self.slides: list[ShownSlide] = []
        self._stored: list[StoredSlide | None] = []
        self._series: list[int | None] = []
        taken = set[str]()  # of all specs: a link names a slide of the store
        for folder in spec_folders(self.name):
            root, _, spec = folder.rpartition("/")
            shelf = PatchStore(root, spec)
            tables = shelf.catalogue.wide(
                shelf.view, ["uri", "key", "series", "reason"], shelf.view.sources["id"].combine_chunks()
            )
            sources = [row for table in tables for row in table.to_pylist()]
            keys = dict.fromkeys(row["key"] for row in sources if row["key"] is not None)
            gone = set(shelf.gone(keys))
            known = {slide.key: slide for slide in shelf.slides([key for key in keys if key not in gone])}
            rows = sorted(sources, key=lambda row: str(row["uri"]))
            for row, name in zip(rows, apart((_name(row["uri"]) for row in rows), taken), strict=True):
                self._add(name, row["uri"], row["series"], row["reason"], known.get(row["key"]), spec)

    def _add(
        self, name: str, uri: str, series: int | None, reason: str | None, stored: StoredSlide | None, spec: str
    ) -> None:
        facts = {"tiling": spec}
        if stored is not None:
            facts |= {"patches": f"{stored.n_patches} of {stored.patch_px} px", "key": stored.key}
        mpp = None if stored is None else stored.mpp
        self.slides.append(ShownSlide(name, uri, mpp=mpp, reason=reason, facts=facts))
        self._stored.append(stored)
        self._series.append(series)

    def series(self, number: int) -> int | None:
        """See `Batch.series`."""
        return self._series[number]

    def patches(self, number: int) -> Patches | None:
        """See `Batch.patches`; without numbers."""
        stored = self._stored[number]
        if stored is None:
            return None
        index = stored.index()
        size = np.full(len(index.x), stored.extent)
        return Patches(Squares(index.x.astype(float), index.y.astype(float), size), {}, np.zeros(len(size), np.bool_))

    def tissue(self, number: int) -> Mask | None:
        """See `Batch.tissue`."""
        stored = self._stored[number]
        return None if stored is None else read_mask_png(stored.mask())


def _name(uri: str) -> str:
    """That of its file, or of its folder where it is one or its file is one of DICOM, which are mostly called alike."""
    if uri.lower().endswith(SUFFIX):
        return name_of(files.parent(uri), folder=True)
    return name_of(uri, folder=is_folder(uri))
