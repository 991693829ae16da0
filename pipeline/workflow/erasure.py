"""Everything that is kept of a patient below a root: found, told, and erased when asked.

Erased: stored patches, plans and features of the patient's slides, and every ledger, report and stage record that shows
them, which the next run writes anew without them. Pages and tables of decisions go too; the decisions themselves, and
what they rest on, name nobody. Told, and left to people: the cohort's rows and the slides' files, which are not ours;
weights that were learned with them; and MLflow's history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.ingest.cohorts import listed
from pipeline.storage.files import delete, exists, join, list_names, read_bytes, read_json
from pipeline.storage.tree import delete_folder
from pipeline.store.catalogue import Catalogue
from pipeline.store.packs import pack_uri
from pipeline.store.patches import APART, UNFINISHED
from pipeline.store.repair import SOURCES
from pipeline.store.shelf import Shelf
from pipeline.workflow.leftovers import check_idle


@dataclass
class Traces:
    """Where a patient is found."""

    patient: str
    slides: dict[str, str] = field(default_factory=dict)
    """slide_id -> URI of its file, in the cohort as it is and in those that were tiled."""
    keys: set[str] = field(default_factory=set)
    """Of stored slides."""
    shared: set[str] = field(default_factory=set)
    """Keys that slides of other patients have too: the same picture under two names; they stay."""
    tilings: set[str] = field(default_factory=set)
    """Fingerprints of tile stages whose cohort had the patient."""
    rows: dict[str, list[bytes]] = field(default_factory=dict)
    """Folder of a spec -> ids of the rows of its catalogue that are about the slides; they go first."""
    erasable: list[str] = field(default_factory=list)
    """Folders and files, in the order in which they go: what names a slide before the slide."""
    packs: list[str] = field(default_factory=list)
    """Packs with such slides: they are written anew without them."""
    left: list[str] = field(default_factory=list)
    """What is not erased, in words."""


def find_patient(config: Config, patient: str) -> Traces:
    """All that is kept of a patient.

    Raises:
        StageError: neither the cohort nor a ledger knows the patient, or a stage is at work below the root.
        StorageError: the storage cannot be read.
    """
    check_idle(config.storage.root)
    traces = Traces(patient)
    rows = listed(config).slides if exists(config.cohort.uri) else ()
    in_cohort = {slide.slide_id: slide.uri for slide in rows if slide.patient_id == patient}
    traces.slides |= in_cohort
    _from_ledgers(config.storage.root, traces)
    _from_sweeps(config.storage.root, traces)
    if not traces.slides:
        raise StageError(
            f"erase: no slide of patient {patient!r} in {config.cohort.uri}, nor in any ledger; check the id"
        )
    traces.keys -= traces.shared
    traces.erasable = [*_records(config, traces), *_swept(config, traces), *_stored(config, traces)]
    traces.left = list(_left(config, traces, in_cohort))
    return traces


def erase(traces: Traces) -> None:
    """Erase what `find_patient` found. After a kill the same command goes on."""
    for spec, ids in traces.rows.items():
        Shelf(spec).take_out(traces.keys)
        Catalogue(spec).purge(ids)
    for uri in traces.erasable:
        delete_folder(uri)
        delete(uri)


def _from_ledgers(root: str, traces: Traces) -> None:
    """Add what the ledgers of all tilings say."""
    others: set[str] = set()
    for name in list_names(join(root, "ledger")):
        table = pq.read_table(pa.BufferReader(read_bytes(join(root, "ledger", name, "slides.parquet"))))
        for row in table.select(["slide_id", "patient_id", "uri", "key"]).to_pylist():
            if row["patient_id"] == traces.patient:
                traces.slides.setdefault(row["slide_id"], row["uri"])
                traces.tilings.add(name.removeprefix("tile-"))
                traces.keys |= {row["key"]} - {None}
            else:
                others.add(row["key"])
    traces.shared = traces.keys & others


def _from_sweeps(root: str, traces: Traces) -> None:
    """Add what sweeps tested, also of cohorts of others."""
    folder = join(root, "sweeps", "reports")
    for name in list_names(folder):
        uri = join(folder, name, "predictions.parquet")
        columns = ["slide_id", "patient_id", "uri"]
        rows = pq.read_table(pa.BufferReader(read_bytes(uri)), columns=columns).to_pylist() if exists(uri) else []
        for row in rows:
            if row["patient_id"] == traces.patient:
                traces.slides.setdefault(row["slide_id"], row["uri"])


def _records(config: Config, traces: Traces) -> Iterator[str]:
    """Stage records, ledgers and reports that show the patient's slides."""
    root = config.storage.root
    for name in list_names(join(root, "stages")):
        stage, _, rest = name.partition("-")
        if stage == "tile" and rest.partition(".")[0].removesuffix("-slides") in traces.tilings:
            yield join(root, "stages", name)
    folders = [join(root, kind, name) for kind in ("reports", "folds") for name in list_names(join(root, kind))]
    for folder in folders:
        if any(_shows(join(folder, table), traces) for table in ("predictions.csv", "quality.csv")):
            yield from _of_outputs(root, folder)
            yield folder
    for fingerprint in sorted(traces.tilings):
        yield join(root, "ledger", f"tile-{fingerprint}")
    for name in list_names(join(root, "release", "decisions")):
        folder = join(root, "release", "decisions", name)
        named = [file for file in list_names(folder) if not file.endswith(".json")]
        if any(_shows(join(folder, file), traces) for file in named if file.endswith(".csv")):
            yield from (join(folder, file) for file in named)


def _swept(config: Config, traces: Traces) -> Iterator[str]:
    """Reports, heatmaps and rows of sweeps that show the slides; what else a file of rows holds is scored again."""
    root = join(config.storage.root, "sweeps")
    for name in list_names(join(root, "reports")):
        if _shows(join(root, "reports", name, "predictions.csv"), traces):
            yield join(root, "reports", name)
    rows, sources = list[str](), set[str]()
    for scoring in list_names(join(root, "rows")):
        for name in list_names(join(root, "rows", scoring)):
            uri = join(root, "rows", scoring, name)
            table = pq.read_table(pa.BufferReader(read_bytes(uri)), columns=["slide_id", "source"])
            own = [row["source"] for row in table.to_pylist() if row["slide_id"] in traces.slides]
            sources.update(own)
            if own:
                rows.append(uri)
    for name in list_names(join(root, "overlays")):
        if name.removesuffix(".png").rpartition("-")[2] in sources:
            yield join(root, "overlays", name)
    yield from rows


def _of_outputs(root: str, folder: str) -> Iterator[str]:
    """Records of the stages whose outputs lie in a folder."""
    for name in list_names(join(root, "stages")):
        uri = join(root, "stages", name)
        if name.endswith(".json"):
            outputs: Mapping[str, Any] = read_json(uri)["outputs"]
            if any(str(output).startswith(folder + "/") for output in outputs.values()):
                yield uri


def _shows(table: str, traces: Traces) -> bool:
    """Whether a CSV table names the patient or one of the slides; where bags are patients, `slide_id` is a bag's."""
    if not exists(table):
        return False
    wanted = {"slide_id": set(traces.slides), "patient_id": {traces.patient}}
    text = csv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()),
        include_columns=list(wanted),
        include_missing_columns=True,  # quality.csv and changes.csv name no patients
    )
    options = csv.ParseOptions(newlines_in_values=True)
    found = csv.read_csv(pa.BufferReader(read_bytes(table)), parse_options=options, convert_options=text)
    return any(
        name.removeprefix("'") in known or name in known
        for column, known in wanted.items()
        for name in found.column(column).drop_null().to_pylist()
    )


def _stored(config: Config, traces: Traces) -> Iterator[str]:
    """Patches, plans and features of the slides, what says that they are stored, and thumbnails of refused ones."""
    patches, features = config.storage.patches, config.storage.features
    assert patches is not None  # compose.py fills both
    assert features is not None
    stores = (patches, *(join(patches, name) for name in APART), features)
    for store in stores:
        for spec in list_names(store):
            if spec not in APART:
                _from_catalogue(join(store, spec), traces)
    folders = [(store, spec) for store in stores for spec in list_names(store)]
    for store, spec in folders:
        for key in sorted(traces.keys):
            for uri in (join(store, spec, key), join(store, spec, UNFINISHED, key)):
                if list_names(uri):
                    yield uri


def _from_catalogue(spec: str, traces: Traces) -> None:
    """Add the keys that the slides' files became, and the rows about either."""
    if list_names(join(spec, SOURCES)):
        raise StageError(f"erase: {join(spec, SOURCES)} is of an older release; run `pipeline store migrate` first")
    view = Catalogue(spec).read()
    of_sources = view.rows.filter(pc.is_in(view.rows["uri"], value_set=pa.array(traces.slides.values(), pa.string())))
    for name in ("key", "left"):  # of slides that were given up, their first parts
        traces.keys |= set(of_sources[name].drop_null().to_pylist()) - traces.shared
    ids = dict.fromkeys(of_sources["id"].to_pylist())
    ids |= dict.fromkeys(one for kind in ("source", "slide") for one in view.ids(kind, "key", traces.keys))
    if ids or view.holds_removed:  # a killed erasure's
        traces.rows[spec] = list(ids)
    packed = view.rows.filter(pc.is_in(view.rows["key"], value_set=pa.array(traces.keys, pa.string())))
    traces.packs += [pack_uri(spec, name) for name in pc.unique(packed["pack"].drop_null()).to_pylist()]


def _left(config: Config, traces: Traces, in_cohort: Mapping[str, str]) -> Iterable[str]:
    root = config.storage.root
    if in_cohort:
        yield f"{config.cohort.uri}: rows {', '.join(sorted(in_cohort))}; remove them, or the next run tiles them again"
    yield f"the slides' own files: {', '.join(sorted(traces.slides.values()))}"
    if traces.shared:
        yield f"stored slides that other patients' rows name too: {', '.join(sorted(traces.shared))}"
    trained = [join(root, "train", name) for name in list_names(join(root, "train"))]
    if trained:
        yield f"weights that may have been learned with them: {', '.join(trained)}, and models registered from these"
    yield (
        f"MLflow's history at {config.tracking.uri}: of runs of {config.name}, the artifacts slides.csv, quality.html, "
        "report.html, predictions.csv, pages and tables of decisions and selected patches, and input examples of "
        "registered models"
    )
    yield f"copies of slides on nodes' disks, until others take their room ({config.tiling.cache or 'tiling.cache'})"
    yield (
        f"digests of ids in {join(root, 'splits.json')} and below {join(root, 'release')}, "
        "by which decisions can be taken again; they name nobody, but who has the id finds them"
    )
    yield "what `predict`, `export` and `qc` wrote where they were told to"
