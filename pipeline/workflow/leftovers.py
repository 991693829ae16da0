"""What no record of a finished stage names below a root: found, told, and removed only when asked.

Trainings that nobody went on with, reports of runs that failed, slides of specs or cohorts that no tiling's record has
any more, files that killed writers left. Whatever is younger than a few days may still be wanted by a run to come.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow.compute as pc

from pipeline.config.recipe import Config
from pipeline.errors import StorageError
from pipeline.storage.files import delete, is_temporary, join, list_names, parent, read_json
from pipeline.storage.lease import check_free
from pipeline.storage.tree import Found, delete_folder, walk
from pipeline.store.catalogue import FOLDER
from pipeline.store.packs import PACKS
from pipeline.store.patches import APART, UNFINISHED
from pipeline.store.repair import SOURCES
from pipeline.store.shelf import Shelf
from pipeline.workflow.stage import Record

log = logging.getLogger(__name__)

DAY_S = 86_400.0
_FOLDERS = ("train", "reports", "ledger")
"""Below the root; each folder in them belongs to one stage's run."""


@dataclass(frozen=True)
class Leftover:
    """A folder or file that no record names."""

    uri: str
    why: str
    files: int
    bytes: int
    modified: float
    """When anything in it was last written, s since 1970."""
    key: str | None = None
    """Of a slide: what the catalogue beside it says of it goes before it."""
    packed: tuple[str, ...] = ()
    """Of a pack: keys of the slides that go; it is written anew without them."""


@dataclass
class _Named:
    """What the records name."""

    outputs: set[str] = field(default_factory=set)
    keys: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Store -> slides."""
    unknown: set[str] = field(default_factory=set)
    """Stores in which a tiling's slides are, and its ledger, which names them, cannot be read."""

    def slides(self, spec: str) -> set[str] | None:
        """Those of a store; None where any may be wanted. Features have the keys of the patches that they are of."""
        if spec in self.unknown or (self.unknown and spec not in self.keys):
            return None
        return self.keys.get(spec, set().union(*self.keys.values()))

    def has(self, uri: str) -> bool:
        """Whether an output is this, or lies below it."""
        return any(output == uri or output.startswith(uri + "/") for output in self.outputs)


def find_leftovers(config: Config, days: float, *, stores_alone: bool = False) -> list[Leftover]:
    """Everything below the config's root that no stage's record names and that is older than `days`.

    Stores that lie elsewhere are not looked at: records of other roots may name what is in them. Where the ledger that
    a tiling's record names cannot be read, its slides are not known: a warning says so, and no slide of the store is
    listed.

    Args:
        config: of the root.
        days: since anything in it was written.
        stores_alone: look at patches, plans and features, and not at trainings, reports and ledgers.

    Raises:
        StageError: a stage is at work below the root.
        StorageError: the storage cannot be read.
    """
    root, before = config.storage.root, time.time() - days * DAY_S
    assert config.storage.patches is not None  # compose.py fills both
    assert config.storage.features is not None
    check_idle(root)
    named = _named(root)
    found: list[Leftover] = []
    for kind in () if stores_alone else _FOLDERS:
        found += _whole(walk(join(root, kind)), join(root, kind), named.has, "no finished stage names it")
    apart = [join(config.storage.patches, name) for name in APART]
    for store in (config.storage.patches, *apart, config.storage.features):
        if store.startswith(root.rstrip("/") + "/"):
            found += _store(store, named)
    return sorted((one for one in found if one.modified < before), key=lambda one: one.uri)


def remove(leftovers: Iterable[Leftover]) -> None:
    """Remove them; slides from the catalogue first, so that after a kill none is said to be there that is not."""
    found = list(leftovers)
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for leftover in found:
        if leftover.key is not None:
            keys[parent(leftover.uri)].add(leftover.key)
        if leftover.packed:
            keys[parent(parent(leftover.uri))].update(leftover.packed)
    for spec, gone in keys.items():
        Shelf(spec).take_out(gone)
        Shelf(spec).forget(gone)
    for leftover in found:
        if leftover.packed:
            continue
        delete_folder(leftover.uri)
        delete(leftover.uri)


def check_idle(root: str) -> None:
    """StageError where a stage is at work below the root."""
    stages = join(root, "stages")
    for name in list_names(stages):
        if name.endswith(".lease"):
            check_free(join(stages, name), name.removesuffix(".lease"))


def _named(root: str) -> _Named:
    named = _Named()
    for name in list_names(join(root, "stages")):
        if name.endswith(".json"):
            record = Record(**read_json(join(root, "stages", name)))
            named.outputs |= set(record.outputs.values())
            if "store" in record.outputs:
                _name_slides(named, record, join(root, "stages", name))
    return named


def _name_slides(named: _Named, record: Record, uri: str) -> None:
    store = record.outputs["store"]
    try:
        named.keys[store].update(record.tiled["key"].to_pylist())
    except StorageError as error:
        named.unknown.add(store)
        log.warning(
            "%s: its slides are not known (%s), so all slides in %s and their features stay; run `tile` with its "
            "config, which writes the ledger anew, or delete the record where nobody wants that cohort any more",
            uri,
            error,
            store,
        )


def _whole(files: Iterable[Found], above: str, is_named: Callable[[str], bool], why: str) -> Iterator[Leftover]:
    """The folders directly in one that nothing names, each as a whole; temporary files in those that are named."""
    groups: dict[str, list[Found]] = defaultdict(list)
    for file in files:
        groups[join(above, file.uri.removeprefix(above + "/").partition("/")[0])].append(file)
    for uri, members in groups.items():
        if not is_named(uri):
            yield _leftover(uri, why, members)
        else:
            yield from _temporaries(members)


def _store(store: str, named: _Named) -> Iterator[Leftover]:
    """Of a store of patches, plans or features: specs, or slides of a spec, that no tiling's record names."""
    specs: dict[str, list[Found]] = defaultdict(list)
    for file in walk(store):
        specs[join(store, file.uri.removeprefix(store + "/").partition("/")[0])].append(file)
    for name in APART:
        specs.pop(join(store, name), None)
    for spec, files in specs.items():
        if not named.has(spec):
            yield _leftover(spec, "no finished tiling or embedding names it", files)
            continue
        wanted = named.slides(spec)
        keys = {join(spec, key) for key in wanted or ()}
        keys |= {join(spec, name) for name in (FOLDER, PACKS, SOURCES, UNFINISHED)}
        stays = keys.__contains__ if wanted is not None else lambda _uri: True
        for one in _whole(files, spec, stays, "no cohort that was tiled here has this slide"):
            yield replace(one, key=one.uri.rpartition("/")[2])
        yield from _unfinished(spec, files)
        yield from _packs(spec, files, wanted)


def _packs(spec: str, files: Iterable[Found], named: Collection[str] | None) -> Iterator[Leftover]:
    """Packs that the catalogue does not know, and those with slides that no tiling's record names."""
    slides: defaultdict[str, set[str]] = defaultdict(set)
    rows = Shelf(spec).view.rows
    for row in rows.filter(pc.is_valid(rows["pack"])).select(["pack", "key"]).to_pylist():
        slides[row["pack"]].add(row["key"])
    for file in files:
        name = file.uri.rpartition("/")[2]
        if file.uri != join(spec, PACKS, name) or is_temporary(name):
            continue
        others = set[str]() if named is None else slides[name] - set(named)
        if not slides[name]:
            yield _leftover(file.uri, "the catalogue does not know it: its writer was killed", [file])
        elif others:
            why = f"{len(others)} of its {len(slides[name])} slides are of no cohort that was tiled here"
            part = replace(file, size=file.size * len(others) // len(slides[name]))
            yield replace(_leftover(file.uri, why, [part]), packed=tuple(sorted(others)))


def _unfinished(spec: str, files: Iterable[Found]) -> Iterator[Leftover]:
    """Records of parts whose slide was never committed; a mark of damage stays, which the next plan needs."""
    for file in files:
        if file.uri.startswith(join(spec, UNFINISHED) + "/") and not file.uri.endswith("/damaged"):
            yield _leftover(file.uri, "a part of a slide whose tiling was not gone on with", [file])


def _temporaries(files: Iterable[Found]) -> Iterator[Leftover]:
    for file in files:
        if is_temporary(file.uri.rpartition("/")[2]):
            yield _leftover(file.uri, "its writer was killed", [file])


def _leftover(uri: str, why: str, files: list[Found]) -> Leftover:
    return Leftover(uri, why, len(files), sum(file.size for file in files), max(file.modified for file in files))
