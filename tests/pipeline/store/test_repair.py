"""Repair and migration: the catalogue says again what lies beside it, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.ingest.tiler import store_slide
from pipeline.schema import CATALOGUE
from pipeline.store import catalogue as module
from pipeline.store.patches import PatchStore, StoredSlide
from pipeline.store.repair import SOURCES, Repaired, migrate_store, repair_store
from pipeline.store.rows import slide_row
from pipeline.store.verify import Report, verify_store
from tests.pipeline.small import pack_slides, small_config, write_cohort
from tests.pipeline.store.test_catalogue import slide
from tests.pipeline.tiled import RGB, SPEC, contents, row
from tests.synth import tissue_rgb, write_pyramid


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two slides and a quarantined one."""
    folder = tmp_path_factory.mktemp("store")
    write_pyramid(folder / "a.tiff", RGB, levels=1)
    write_pyramid(folder / "b.tiff", tissue_rgb(613, 487, seed=5), levels=1)
    (folder / "c.tiff").write_text("not a slide")
    for name in "abc":
        store_slide(row(folder / f"{name}.tiff"), SPEC, str(folder / "store"))
    return folder / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def opened(store: Path) -> PatchStore:
    return PatchStore(str(store), SPEC.fingerprint())


def slides(store: Path) -> list[dict[str, Any]]:
    return list(opened(store).view.slides.drop_columns(["id"]).to_pylist())


def verify(store: Path) -> Report:
    return verify_store(str(store), 1, lambda done, total: None)


def is_whole(store: Path) -> bool:
    report = verify(store)
    return report.damage == report.leftovers == []


def test_a_whole_store_is_left_alone(store: Path) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert repair_store(str(store)) == Repaired(specs=1)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_slides_of_a_file_that_was_cut_short_are_found_again(store: Path) -> None:
    before, spec = slides(store), store / SPEC.fingerprint()
    cut = [path for path in spec.glob("catalogue/*") if b"no" not in path.name.encode()]
    for path in cut:
        path.write_bytes(path.read_bytes()[:100])
    done = repair_store(str(store))
    assert (done.added, done.removed, sorted(done.deleted)) == (2, 0, sorted(map(str, cut)))
    assert slides(store) == before
    assert is_whole(store)
    (spec / "catalogue").rename(store.parent / "catalogue")  # none at all
    assert repair_store(str(store)).added == 2
    assert slides(store) == before


def test_what_contradicts_the_folders_is_corrected(store: Path) -> None:
    before, patches = slides(store), opened(store)
    one, two = (known["key"] for known in before)
    patches.forget([one])
    patches.append([{**slide(one, n_patches=1), "facts": "{}"}, slide("f" * 32)])
    shutil.rmtree(store / SPEC.fingerprint() / two)
    assert not is_whole(store)
    done = repair_store(str(store))
    assert (done.added, done.removed, done.deleted, done.refused) == (1, 2, [], [])
    assert slides(store) == before[:1]
    assert is_whole(store)


def test_folders_that_say_nothing_or_are_of_another_spec_are_told_and_the_others_mended(store: Path) -> None:
    before, patches = slides(store), opened(store)
    one, two = (known["key"] for known in before)
    commit = store / SPEC.fingerprint() / one / "slide.json"
    whole = commit.read_text()
    other = SPEC.model_copy(update={"min_tissue": 0.1})
    copied = whole.replace('"min_tissue": 0.4', '"min_tissue": 0.1')
    assert copied != whole
    for text in ("{", "[]", "{}", '{"key": 1}', copied, whole.replace(one, two)):
        commit.write_text(text)
        patches.forget([two])
        done = repair_store(str(store))
        assert [str(commit) in told and "folder" in told for told in done.refused] == [True], text
        assert slides(store) == before[1:]
        assert any(finding.uri.startswith(str(commit.parent)) for finding in verify(store).damage)
        patches.look_again()
    commit.write_text(whole)
    assert repair_store(str(store)).added == 1
    assert slides(store) == before
    Path(shutil.copytree(store / SPEC.fingerprint() / one, store / other.fingerprint() / one))
    assert len(repair_store(str(store)).refused) == 1
    assert not PatchStore(str(store), other.fingerprint()).has(one)


def test_a_file_of_a_newer_release_is_left_and_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "CATALOGUE", CATALOGUE.with_metadata({b"ips.schema_version": b"99"}))
        opened(store).append([slide("k")])
    before = contents_of_catalogue(store)
    told = CliRunner().invoke(app, ["store", "repair", str(store)])
    assert told.exit_code == 3
    assert "written by a newer release" in told.stdout
    assert contents_of_catalogue(store) == before
    said = json.loads(CliRunner().invoke(app, ["store", "repair", str(store), "--json"]).stdout)
    assert (said["outcome"], len(said["refused"]), said["deleted"]) == ("failed", 1, [])


def contents_of_catalogue(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*/catalogue/*")}


def as_before_there_was_a_catalogue(store: Path) -> None:
    """What an older release left: a file for each source."""
    patches = opened(store)
    folder = store / SPEC.fingerprint() / SOURCES
    folder.mkdir()
    ids = patches.view.sources["id"].combine_chunks()
    wide = {
        row["id"]: row
        for rows in patches.catalogue.wide(patches.view, ["error", "size", "etag", "mtime"], ids)
        for row in rows.to_pylist()
    }
    for number, source in enumerate(patches.view.sources.to_pylist()):
        status = {name: source[name] for name in ("key", "status", "reason", "n_patches", "n_bad_tiles")}
        status["error"] = wide[source["id"]]["error"]
        record = {
            "source": {"uri": source["uri"], "mpp": None, "mask": None, "coords": None, "series": None},
            "version": {name: wide[source["id"]][name] for name in ("size", "etag", "mtime")},
            "status": status,
            "left": source["left"],
        }
        (folder / f"{number}.json").write_text(json.dumps(record))
    shutil.rmtree(patches.catalogue.uri)


def test_a_store_of_an_older_release_is_taken_over_in_place(store: Path) -> None:
    before = contents(store)
    as_before_there_was_a_catalogue(store)
    (store / SPEC.fingerprint() / SOURCES / "torn.json").write_text("{")
    done = CliRunner().invoke(app, ["store", "migrate", str(store)])
    assert (done.exit_code, "2 slides added" in done.stdout, "3 records of sources" in done.stdout) == (0, True, True)
    assert contents(store) == before
    assert migrate_store(str(store)) == Repaired(specs=1)


def test_a_store_of_an_older_release_is_read_without_tiling_again(store: Path, original: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.arrow")}
    as_before_there_was_a_catalogue(store)
    for name in "ab":
        assert store_slide(row(original.parent / f"{name}.tiff"), SPEC, str(store)).status == "committed"
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.arrow")} == before
    assert len(slides(store)) == 2


@pytest.fixture
def packed(tmp_path: Path) -> tuple[PatchStore, list[StoredSlide]]:
    """Three slides in one pack."""
    config = small_config()
    pairs = pack_slides(write_cohort(tmp_path, ["no", "yes", "no"]), tmp_path / "packed", config)
    return PatchStore(str(tmp_path / "packed"), config.tiling.fingerprint()), [stored for _, stored in pairs]


def test_slides_of_packs_are_found_again(packed: tuple[PatchStore, list[StoredSlide]]) -> None:
    store, slides = packed
    keys = [slide.key for slide in slides]
    (member,) = Path(store.catalogue.uri).iterdir()
    member.write_bytes(member.read_bytes()[:-9])
    done = repair_store(store.uri)
    assert (done.added, done.removed, done.refused) == (3, 0, [])
    store.look_again()
    assert store.slides(keys) == slides
    again = repair_store(store.uri)
    assert (again.added, again.removed) == (0, 0)
    store.forget(keys[:1])  # as when it was taken out: that is no damage
    assert repair_store(store.uri).added == 0


def test_a_wrong_place_in_a_pack_is_corrected(packed: tuple[PatchStore, list[StoredSlide]]) -> None:
    store, slides = packed
    wrong, uri = slides[1], Path(slides[1].uri)
    assert wrong.place is not None
    facts = store.facts(wrong.key)
    store.forget([wrong.key])
    store.append([slide_row(facts, uri.name, replace(wrong.place, first=0).json())])
    report = verify_store(store.uri, 1, lambda *_: None)
    assert [(finding.uri, finding.remedy) for finding in report.damage] == [(str(uri), "run `pipeline store repair`")]
    done = repair_store(store.uri)
    assert (done.added, done.removed) == (1, 0)
    store.look_again()
    assert store.slide(wrong.key) == wrong
    report = verify_store(store.uri, 1, lambda *_: None)
    assert (report.damage, report.leftovers) == ([], [])
    assert (report.slides, report.files) == (3, 1)
    assert report.patches == sum(slide.n_patches for slide in slides)


def test_a_pack_that_is_gone_or_changed_is_named(packed: tuple[PatchStore, list[StoredSlide]]) -> None:
    store, slides = packed
    pack, strange = Path(slides[0].uri), Path(slides[0].uri).with_name(f"pack-{'0' * 64}.arrow")
    data = pack.read_bytes()
    strange.write_bytes(data)
    report = verify_store(store.uri, 1, lambda *_: None)
    assert report.damage == []
    assert [(finding.uri, finding.what) for finding in report.leftovers] == [
        (str(strange), "a pack that the catalogue does not know")
    ]
    strange.unlink()
    pack.write_bytes(data[:-1])
    assert [finding.what for finding in verify_store(store.uri, 1, lambda *_: None).damage] == [
        f"{pack}: was changed: its sha256 is not that of its name; tile its slides again"
    ]
    assert len(repair_store(store.uri).refused) == 1
    pack.unlink()
    (damage,) = verify_store(store.uri, 1, lambda *_: None).damage
    assert damage.what == "is gone, and the catalogue says that 3 slides are in it"
    assert repair_store(store.uri).removed == 3
    store.look_again()
    assert store.gone([slide.key for slide in slides]) == [slide.key for slide in slides]
