"""A catalogue made whole again from what lies beside it: each slide's folder says what its rows say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.compute as pc

from pipeline.cohort.table import CohortSlide
from pipeline.errors import DamagedError
from pipeline.storage import files
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row, View
from pipeline.store.packs import PACKS, is_pack, pack_uri, read_pack
from pipeline.store.rows import compact, source_row, stored_row
from pipeline.store.shelf import Shelf
from pipeline.store.verify import REMEDY, SLIDE, is_of, spec_folders

SOURCES = "sources"
"""Folder of an older release: a file for each source."""
THREADS = 16  # they wait on the storage
TOGETHER = 4096  # rows of a file


@dataclass
class Repaired:
    """What was done to a store."""

    specs: int = 0
    deleted: list[str] = field(default_factory=list)
    """Files of catalogues that could not be read."""
    refused: list[str] = field(default_factory=list)
    """What people have to mend, in words."""
    added: int = 0
    """Slides that the catalogue did not know, or knew otherwise."""
    removed: int = 0
    """Slides that it knew and that are gone."""
    taken_over: int = 0
    """Records of sources from an older release."""


def repair_store(store: str) -> Repaired:
    """Mend the catalogues of a store of patches (with the plans below it) or of features. While no stage is at work.

    Sources that only an unreadable file knew are looked at again by the next run, which finds their slides.

    Raises:
        StorageError: no store is there, or the storage fails.
    """
    return _each(store, lambda _spec, _done: None)


def migrate_store(store: str) -> Repaired:
    """Take over a store of an older release, which had a file for each source and no catalogue. As `repair_store`."""
    return _each(store, _take_over)


def _each(store: str, first: Callable[[str, Repaired], None]) -> Repaired:
    done = Repaired()
    for uri in spec_folders(files.absolute(store)):
        done.specs += 1
        first(uri, done)
        _repair(Shelf(uri), done)
    return done


def _repair(shelf: Shelf, done: Repaired) -> None:
    broken = shelf.catalogue.broken()
    cut = [name for name, error in broken.items() if isinstance(error, DamagedError)]
    done.refused += [str(error) for name, error in broken.items() if name not in cut]
    view = shelf.catalogue.read(without=broken)
    known = {row["key"]: row["id"] for row in view.slides.filter(pc.is_null(view.slides["pack"])).to_pylist()}
    said = {
        row["key"]: row["facts"]
        for rows in shelf.catalogue.wide(view, ["key", "facts"], view.slides["id"].combine_chunks())
        for row in rows.to_pylist()
    }
    found, refused = _folders(shelf)
    done.refused += refused
    other = [key for key, row in found.items() if said.get(key) != row["facts"]]
    gone = [key for key in known if key not in found]
    stale = [*gone, *(key for key in other if key in known)]
    if stale:
        shelf.catalogue.remove(view.ids("slide", "key", stale))
    for start in range(0, len(other), TOGETHER):
        shelf.append([found[key] for key in other[start : start + TOGETHER]])
    _repair_packs(shelf, view, said, done)
    shelf.catalogue.delete(cut)
    done.added += len(other)
    done.removed += len(gone)
    done.deleted += [files.join(shelf.catalogue.uri, name) for name in cut]


def _folders(shelf: Shelf) -> tuple[dict[str, Row], list[str]]:
    """By key the row that each slide's folder gives, and those that give none though they have a `slide.json`."""
    names = [name for name in files.list_names(shelf.uri) if SLIDE.match(name)]
    with ThreadPoolExecutor(THREADS) as pool:
        rows = dict(zip(names, pool.map(lambda name: _row(shelf, name), names), strict=True))
    found = {name: row for name, row in rows.items() if row is not None and not isinstance(row, str)}
    return found, [row for row in rows.values() if isinstance(row, str)]


def _row(shelf: Shelf, key: str) -> Row | str | None:
    """What a slide's folder says; in words why it does not, None where it is not committed."""
    uri = files.join(shelf.uri, key, "slide.json")
    try:
        facts = shelf.commit_of(key)
        if facts is None:
            return None
        if is_of(facts, key, shelf.uri.rpartition("/")[2]):
            return stored_row(facts)
        what = "is of another slide, or of another tiling spec"
    except (DamagedError, KeyError, TypeError, ValueError) as error:
        what = f"no commit that can be read ({type(error).__name__}: {error})"
    return f"{uri}: {what}; {REMEDY}"


def _repair_packs(shelf: Shelf, view: View, said: Mapping[str, str], done: Repaired) -> None:
    """Correct what the catalogue says of slides in packs; take in packs that it does not know, out those that are gone.

    The rows of a pack are written together: one that some are about has lost none, but slides may have been taken out.

    Args:
        shelf: where they are.
        view: its catalogue.
        said: facts by key, of the slides that are seen.
        done: what was done.
    """
    stored = [name for name in files.list_names(files.join(shelf.uri, PACKS)) if is_pack(name)]
    rows: dict[str, list[Row]] = {name: [] for name in stored}
    lost: list[bytes] = []
    for row in view.rows.filter(pc.is_valid(view.rows["pack"])).select(["id", "key", "pack", "place"]).to_pylist():
        if row["pack"] in rows:
            rows[row["pack"]].append(row)
        else:
            lost.append(row["id"])
    if lost:
        shelf.catalogue.remove(lost)
    done.removed += len(lost)
    for name in stored:
        try:
            pack, slides = read_pack(pack_uri(shelf.uri, name))
        except DamagedError as error:
            done.refused.append(str(error))
            continue
        right = {one.key: (pack.places[one.key].json(), compact(one.facts)) for one in slides}
        wrong = [row for row in rows[name] if right.get(row["key"]) != (row["place"], said.get(row["key"]))]
        keys = {row["key"] for row in wrong} if rows[name] else right.keys()
        added = [stored_row(one.facts, name, right[one.key][0]) for one in slides if one.key in keys]
        shelf.catalogue.append(added, instead_of=[row["id"] for row in wrong])
        done.added += len(added)


def _take_over(spec: str, done: Repaired) -> None:
    """Records of sources as an older release wrote them, one file each, into the catalogue."""
    names = files.list_names(files.join(spec, SOURCES))
    for start in range(0, len(names), TOGETHER):
        places = [files.join(spec, SOURCES, name) for name in names[start : start + TOGETHER]]
        with ThreadPoolExecutor(THREADS) as pool:
            rows = list(pool.map(_old_row, places))
            Shelf(spec).append([row for row in rows if row is not None])
            list(pool.map(files.delete, places))
        done.taken_over += sum(row is not None for row in rows)


def _old_row(uri: str) -> Row | None:
    """The row of a record; None of one that cannot be read: the next run looks at the source again."""
    try:
        record = files.read_json(uri)
        source, status = record["source"], record["status"]
        mpp = None if source["mpp"] is None else float(source["mpp"])
        given = {name: source[name] for name in ("mask", "coords", "series")}
        slide = CohortSlide("", source["uri"], "", None, mpp, {}, {}, **given)
        outcome = {"picture": None, "limits": None, **status}
        return source_row(slide, SourceVersion(**record["version"]), outcome, record["left"])
    except (DamagedError, KeyError, TypeError, ValueError):
        return None
