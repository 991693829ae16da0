"""Whether a store of patches or features still holds what was committed: every byte is read, nothing is changed.

*Damage* is a committed slide that is not whole: a file absent, of another length or another digest, an index that
does not lead to its patches. *Leftovers* are what killed runs leave behind; they harm nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.base import fingerprint
from pipeline.errors import DamagedError, StorageError
from pipeline.schema import INDEX
from pipeline.storage import files
from pipeline.store.catalogue import FOLDER, Catalogue, View
from pipeline.store.packs import PACKS, pack_uri, read_pack
from pipeline.store.parts import part_index
from pipeline.store.patches import APART, UNFINISHED
from pipeline.store.rows import compact, slide_key

_SPEC = re.compile(r"^[0-9a-f]{16}(-[0-9a-f]{16})?$")  # a store's folders: fingerprints of tiling spec and encoder
SLIDE = re.compile(r"^[0-9a-f]{32}$")
"""Names of what is in them: slides by their key."""
_CLEAN = "delete it when no run is active"
REMEDY = "delete the slide's folder, and run the tile stage (for features the embed stage)"
_TILE = "the next run tiles its slides (for features, embeds them)"
_REBUILD = "run `pipeline store repair`"
_GIVEN_UP = "delete the folder when no run is active"
_GO_ON = "the next run goes on with it if its slide is still in the cohort, and what it was; else delete the folder"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    uri: str
    what: str
    """What was found, and what it should be."""
    remedy: str
    damage: bool = False


@dataclass
class Report:
    """What was looked at, and what was found."""

    store: str
    slides: int = 0
    patches: int = 0
    files: int = 0
    bytes: int = 0
    damage: list[Finding] = field(default_factory=list)
    leftovers: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Sort findings into damage and leftovers."""
        for finding in findings:
            (self.damage if finding.damage else self.leftovers).append(finding)


@dataclass(frozen=True)
class _Commit:
    """A slide's folder with what `slide.json` says of it."""

    uri: str
    facts: Mapping[str, Any]
    indexed: bool
    """Whether its index is whole."""


@dataclass(frozen=True)
class _Fates:
    """What the catalogue says of slides."""

    committed: Mapping[str, str]
    """Key -> what slide.json should say, as `rows.compact` has it."""
    given_up: Mapping[str, str]
    """Key under which something was left -> reason."""


_Check = Callable[[], list[Finding]]


def _damage(uri: str, what: str, remedy: str = REMEDY) -> Finding:
    return Finding(uri, what, remedy, damage=True)


def verify_store(store: str, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """Read all of a store of patches (with the plans below it) or of features, or of one spec's folder in it.

    Args:
        store: URI, such as the config's `storage.patches`.
        threads: files read at a time; each takes the memory of one part, some 60 MB.
        on_progress: called with the files read and their number.

    Raises:
        StorageError: no patch store is there, or the storage fails.
    """
    report = Report(files.absolute(store))
    _index_table.cache_clear()
    with ThreadPoolExecutor(threads) as pool:
        for spec in spec_folders(report.store):
            _verify_spec(spec, report, pool, on_progress)
    return report


def _verify_spec(spec: str, report: Report, pool: ThreadPoolExecutor, on_progress: Callable[[int, int], None]) -> None:
    folders = [files.join(spec, name) for name in files.list_names(spec) if SLIDE.match(name)]
    catalogue = Catalogue(spec)
    broken = catalogue.broken()
    view = catalogue.read(without=broken)
    report.add(_damage(files.join(catalogue.uri, name), str(error), _REBUILD) for name, error in broken.items())
    fates = _fates(catalogue, view)
    commits = []
    for commit, findings in pool.map(lambda uri: _look_at(uri, fates), folders):
        report.add(findings)
        if commit is not None:
            commits.append(commit)
    packs = _packs(view)
    checks = [check for commit in commits for check in _checks(commit)]
    checks += [partial(_pack, pack_uri(spec, name), rows) for name, rows in packs.items()]
    for done, findings in enumerate(pool.map(_run, checks), 1):
        report.add(findings)
        on_progress(done, len(checks))
    keys = {str(commit.facts["key"]) for commit in commits}
    looked_at = {uri.rpartition("/")[2] for uri in folders}
    for key in fates.committed:
        if key not in looked_at:
            report.add([Finding(files.join(spec, key), "the catalogue says that it is there", "the next run tiles it")])
    report.add(_unfinished(spec, keys, fates))
    stored = files.list_versions(files.join(spec, PACKS))
    report.add(_strange_packs(spec, stored, packs))
    packed = view.slides.filter(pc.is_in(view.slides["pack"], value_set=pa.array(stored, pa.string())))
    entries = [entry for commit in commits for entry in _entries(commit.facts)]
    report.slides += len(commits) + len(packed)
    report.patches += sum(commit.facts["n_patches"] for commit in commits) + (pc.sum(packed["n_patches"]).as_py() or 0)
    report.files += len(entries) + len(packs.keys() & stored.keys())
    report.bytes += sum(entry["bytes"] for entry in entries)
    report.bytes += sum(stored[name].size for name in packs.keys() & stored.keys())


def _run(check: _Check) -> list[Finding]:
    return check()


def spec_folders(store: str) -> list[str]:
    """The folders of specs in a store, plans among them, or the one that is named.

    Raises:
        StorageError: there is none.
    """
    names = files.list_names(store)
    found = [files.join(store, name) for name in names if _SPEC.match(name)]
    for folder in APART:
        if folder in names:
            found += spec_folders(files.join(store, folder))
    if found:
        return found
    if any(name in (FOLDER, UNFINISHED) or SLIDE.match(name) for name in names):
        return [store]
    raise StorageError(
        f"{store}: no patch store; name the folder of storage.patches, by default <storage.root>/patches"
    )


def _entries(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    thumbnail = [facts["thumbnail"]] if "thumbnail" in facts else []  # features have none of their own
    return [*facts["parts"], facts["index"], *thumbnail, *facts.get("files", ())]


def is_of(facts: Mapping[str, Any], key: str, spec: str) -> bool:
    """Whether a commit is that of the slide, and of the spec, in whose folder it stands."""
    if "encoder" in facts:
        return bool(facts["key"] == key)
    made = slide_key(*(facts[name] for name in ("content", "mpp", "guide", "series")))
    cut_by = fingerprint({"schema": facts["schema_version"], "tiling": facts["spec"]})
    return bool(facts["key"] == key == made and cut_by == spec)


def _look_at(uri: str, fates: _Fates) -> tuple[_Commit | None, list[Finding]]:
    """A slide's folder: its commit with the index, and what is there that is not the commit's."""
    key, names = uri.rpartition("/")[2], files.list_versions(uri)
    stale = [name for name in names if files.is_temporary(name)]
    found = [Finding(files.join(uri, name), "its writer was killed or is still writing", _CLEAN) for name in stale]
    if "slide.json" not in names:
        return None, [*found, _uncommitted(uri, len(names) - len(stale), fates)]
    try:
        facts = files.read_json(files.join(uri, "slide.json"))
        right = is_of(facts, key, uri.split("/")[-2])
        known = {"slide.json", *(entry["name"] for entry in _entries(facts))}
    except (StorageError, KeyError, TypeError) as error:
        return None, [*found, _damage(files.join(uri, "slide.json"), f"no commit that can be read: {error}")]
    if not right:
        found.append(_damage(uri, "slide.json is of another slide, or of another tiling spec"))
    elif key not in fates.committed:
        found.append(Finding(uri, "a whole slide that the catalogue does not know", _REBUILD))
    elif fates.committed[key] != compact(facts):
        found.append(_damage(uri, "the catalogue says otherwise of it than its slide.json", _REBUILD))
    found += [
        Finding(files.join(uri, name), "a file that the commit does not name", "delete it")
        for name in names
        if name not in known and name not in stale
    ]
    broken = _index(uri, facts)
    return _Commit(uri, facts, not broken), found + broken


def _uncommitted(uri: str, left: int, fates: _Fates) -> Finding:
    """What a folder without a commit is: a slide that lost it, one that was given up, or a killed run's."""
    key = uri.rpartition("/")[2]
    if key in fates.committed:
        what = "is gone, and the catalogue says that the slide was committed"
        return _damage(files.join(uri, "slide.json"), what)
    if key in fates.given_up:
        return Finding(uri, f"{left} files of a slide that was given up: {fates.given_up[key]}", _GIVEN_UP)
    return Finding(uri, f"{left} files of a slide that is not committed", _GO_ON)


def _index(uri: str, facts: Mapping[str, Any]) -> list[Finding]:
    place, entry = files.join(uri, facts["index"]["name"]), facts["index"]
    data, found = _read(place, entry)
    if data is None:
        return found
    table = pq.read_table(pa.BufferReader(data))
    named = set(INDEX.names) <= set(table.column_names)  # plans have two columns more
    if not named or table.column("row").to_pylist() != list(range(len(table))) or len(table) != facts["n_patches"]:
        return [_damage(place, f"does not number the {facts['n_patches']} patches of the slide")]
    return []


@lru_cache(maxsize=16)  # 50 bytes a patch; the parts of a slide are checked one after another
def _index_table(uri: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(files.read_bytes(uri))).select(INDEX.names[1:])


def _checks(commit: _Commit) -> Iterator[_Check]:
    for number, entry in enumerate(commit.facts["parts"]):
        yield partial(_part, commit, number, entry)
    for entry in _entries(commit.facts)[len(commit.facts["parts"]) + 1 :]:
        yield partial(_file, commit, entry)


def _part(commit: _Commit, number: int, entry: Mapping[str, Any]) -> list[Finding]:
    uri = files.join(commit.uri, entry["name"])
    data, found = _read(uri, entry)
    if data is None or not commit.indexed:
        return found
    index = _index_table(files.join(commit.uri, commit.facts["index"]["name"]))
    listed = index.filter(pc.equal(index.column("part"), number))
    if "encoder" in commit.facts:
        ends = pc.add(listed.column("offset"), listed.column("length"))
        right = len(listed) == entry["patches"] and pc.max(ends).as_py() <= len(data)
    else:
        right = listed.equals(part_index(data, number).drop_columns(["row"]))
    return [] if right else [_damage(uri, "index.parquet does not lead to its patches")]


def _file(commit: _Commit, entry: Mapping[str, Any]) -> list[Finding]:
    return _read(files.join(commit.uri, entry["name"]), entry)[1]


def _read(uri: str, entry: Mapping[str, Any]) -> tuple[bytes | None, list[Finding]]:
    """The file's bytes when they are the committed ones."""
    data = files.read_if_there(uri)
    if data is None:
        what = "is gone"
    elif len(data) != entry["bytes"]:
        what = f"has {len(data)} bytes, {entry['bytes']} were committed"
    elif hashlib.sha256(data).hexdigest() != entry["sha256"]:
        what = "was changed: its sha256 is not the committed one"
    else:
        return data, []
    return None, [_damage(uri, what)]


def _packs(view: View) -> dict[str, list[tuple[str, str]]]:
    """Key and place of all slides that the catalogue says are in packs, by the pack's name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in view.rows.filter(pc.is_valid(view.rows["pack"])).select(["pack", "key", "place"]).to_pylist():
        found.setdefault(row["pack"], []).append((row["key"], row["place"]))
    return found


def _pack(uri: str, rows: Sequence[tuple[str, str]]) -> list[Finding]:
    """A pack, read whole."""
    if not files.exists(uri):
        return [_damage(uri, f"is gone, and the catalogue says that {len(rows)} slides are in it", _TILE)]
    try:
        pack, _ = read_pack(uri)
    except DamagedError as error:
        return [_damage(uri, str(error), "delete it, and run the tile stage (for features the embed stage)")]
    wrong = [key for key, place in rows if key not in pack.places or pack.places[key].json() != place]
    what = f"the catalogue does not lead to its slides {', '.join(wrong[:5])}"
    return [_damage(uri, what, _REBUILD)] if wrong else []


def _strange_packs(spec: str, stored: Iterable[str], packs: Collection[str]) -> Iterator[Finding]:
    """Files among the packs that the catalogue does not name."""
    for name in stored:
        if files.is_temporary(name):
            yield Finding(pack_uri(spec, name), "its writer was killed or is still writing", _CLEAN)
        elif name not in packs:
            yield Finding(pack_uri(spec, name), "a pack that the catalogue does not know", f"{_CLEAN}, or {_REBUILD}")


def _fates(catalogue: Catalogue, view: View) -> _Fates:
    """What the files of a catalogue say that can be read."""
    own = view.slides.filter(pc.is_null(view.slides["pack"]))
    wide = catalogue.wide(view, ["key", "facts"], own["id"].combine_chunks())
    committed = {row["key"]: row["facts"] for rows in wide for row in rows.to_pylist()}
    left = view.sources.filter(pc.is_valid(view.sources["left"])).select(["left", "reason"]).to_pylist()
    return _Fates(committed, {row["left"]: row["reason"] for row in left})


def _unfinished(spec: str, keys: set[str], fates: _Fates) -> list[Finding]:
    """Records of the parts of large slides, by slide."""
    found = []
    for key in files.list_names(files.join(spec, UNFINISHED)):
        uri = files.join(spec, UNFINISHED, key)
        count = sum(name.startswith("part-") for name in files.list_versions(uri))
        if not count:  # the mark of a plan that is not trusted, which stays
            continue
        if key in keys:
            found.append(Finding(uri, f"records of {count} parts of a committed slide", "delete the folder"))
        elif key in fates.given_up:
            what = f"records of {count} parts of a slide that was given up: {fates.given_up[key]}"
            found.append(Finding(uri, what, _GIVEN_UP))
        else:
            found.append(Finding(uri, f"records of {count} parts", _GO_ON))
    return found
