"""One spec's folder of a store, as it is looked at: by its catalogue and the names of what lies in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError
from pipeline.storage import files
from pipeline.storage.listing import folder_names
from pipeline.store.catalogue import Catalogue, Row, Texts, View
from pipeline.store.packs import PACKS, pack_uri, read_pack, without
from pipeline.store.rows import stored_row

FEW = 16  # slides on S3 that are asked for one by one: a listing of all takes as many requests at least


class Shelf:
    """Slides by key. Catalogue and names are read once, until this object writes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.catalogue = Catalogue(uri)
        self._view: View | None = None
        self._looked = 0.0
        self._names: frozenset[str] | None = None
        self._local = "" if files.is_remote(uri) else str(files.local_path(uri))
        self._packs: frozenset[str] | None = None

    @property
    def view(self) -> View:
        """What the catalogue says."""
        if self._view is None:
            self._looked = time.monotonic()
            self._view = self.catalogue.read()
        return self._view

    def look_again(self) -> None:
        """Forget what was seen: others may have written."""
        self._view = self._names = self._packs = None

    def look_again_after(self, seconds: float) -> None:
        """As `look_again`, where the look is older: for whoever is at work on slide after slide for hours."""
        if time.monotonic() - self._looked > seconds:
            self.look_again()

    def key_of(self, asked: str) -> str | None:
        """Key of the slide that a version of a source (`asked_digest`) became; None where it did not, or it is gone.

        Unlike `PatchStore.status` it tells nothing of why, and reads no file of the catalogue again for that.
        """
        (key,) = self.view.sources["key"].take(self.view.source_places([asked])).to_pylist()
        return key if key is not None and self.has(key) else None

    def append(self, rows: Sequence[Row]) -> None:
        """Commit these rows (`rows`), all or none."""
        self.catalogue.append(rows)
        self.look_again()

    def tidy(self) -> None:
        """Merge the catalogue's files where they are many."""
        if self.catalogue.tidy(self.view):
            self.look_again()

    def forget(self, keys: Collection[str]) -> None:
        """Take these slides out of the catalogue; sources that became them are looked at again."""
        self.catalogue.remove(self.view.ids("slide", "key", keys))
        self.look_again()

    def forget_gone(self) -> None:
        """Take those slides out of the catalogue that are not there any more."""
        if gone := self.gone(self.view.slides["key"]):
            self.forget(gone)

    def take_out(self, keys: Collection[str]) -> None:
        """Write the packs that hold these slides anew without them, while nobody reads them; then they are not there.

        What the catalogue says of the slides themselves stays, so that after a kill the same call goes on.

        Raises:
            DamagedError: a pack was changed.
        """
        rows = self.view.rows.filter(pc.is_valid(self.view.rows["pack"]))
        theirs = pc.is_in(rows["key"], value_set=pa.array(keys, pa.string()))
        for name in pc.unique(rows.filter(theirs)["pack"]).to_pylist():
            uri = pack_uri(self.uri, name)
            if files.exists(uri):
                left = rows.filter(pc.and_(pc.equal(rows["pack"], name), pc.invert(theirs)))
                self._rewrite(uri, keys, left["id"].to_pylist())
                files.delete(uri)
        self.look_again()

    def _rewrite(self, uri: str, keys: Collection[str], ids: Sequence[bytes]) -> None:
        """Put the other slides of a pack, which rows of these ids are about, into another one."""
        slides = read_pack(uri)[1]
        pack = without(slides, keys)
        if pack is not None:
            files.write_bytes(pack_uri(self.uri, pack.name), pack.data)
            facts = {slide.key: slide.facts for slide in slides}
            new = [stored_row(facts[key], pack.name, place.json()) for key, place in pack.places.items()]
            self.catalogue.append(new, instead_of=ids)

    def has(self, key: str) -> bool:
        """Whether the slide is committed, and there."""
        return not self.gone([key])

    def gone(self, keys: Iterable[str] | pa.ChunkedArray) -> list[str]:
        """Which of the slides are not committed, or whose folder or pack is not there any more, each once."""
        wanted = pc.unique(keys if isinstance(keys, pa.ChunkedArray) else pa.array(list(keys), pa.string()))
        places = self.view.slide_places(wanted)
        packs = self.view.slides["pack"].take(places).combine_chunks()
        packed = pc.is_valid(packs)
        there = pc.is_in(packs, pa.array(self._pack_files(), pa.string())) if pc.any(packed).as_py() else packed
        own = pc.and_(pc.is_valid(places), pc.invert(packed))
        folders = wanted.filter(own)
        found = [self._is_there(key.as_py(), len(folders)) for key in folders]
        there = pc.replace_with_mask(there, own, pa.array(found, pa.bool_()))
        gone: list[str] = wanted.filter(pc.invert(there)).to_pylist()
        return gone

    def require(self, keys: Iterable[str], what: str) -> None:
        """StorageError where one of the slides is not there; `what` is missing, and what to do."""
        wanted = list(keys)
        if self.gone(wanted):
            self.look_again()  # it may have been committed since
            if gone := self.gone(wanted):
                raise StorageError(f"{files.join(self.uri, gone[0])}: {what}")

    def all_facts(self, keys: Texts) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Key and all that its commit says, of each of these slides that is committed, in no order."""
        chosen = self.view.slides["id"].take(self.view.slide_places(keys).drop_null())
        for rows in self.catalogue.wide(self.view, ["key", "facts"], chosen.combine_chunks()):
            for row in rows.to_pylist():
                yield row["key"], json.loads(row["facts"])

    def commit_of(self, key: str) -> Mapping[str, Any] | None:
        """What `slide.json` in the slide's folder says, whether it is committed or about to be; None without it."""
        uri = files.join(self.uri, key, "slide.json")
        data = files.read_if_there(uri)
        return None if data is None else files.parsed_json(uri, data)

    def _is_there(self, key: str, asked: int) -> bool:
        """Whether a slide's folder is there; on a disk, and where few are asked for, whether its commit is."""
        if not files.is_remote(self.uri):
            return os.path.exists(os.path.join(self._local, key, "slide.json"))  # noqa: PTH110, PTH118
        if self._names is None and asked <= FEW:
            return files.exists(files.join(self.uri, key, "slide.json"))
        if self._names is None:
            self._names = folder_names(self.uri)
        return key in self._names

    def _pack_files(self) -> frozenset[str]:
        if self._packs is None:
            self._packs = frozenset(files.list_names(files.join(self.uri, PACKS)))
        return self._packs
