"""The catalogue: one view of a set of files, in whatever order they came, were merged or left behind."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedError, StorageError
from pipeline.schema import CATALOGUE
from pipeline.storage import files
from pipeline.store import catalogue as module
from pipeline.store.catalogue import FAN, GRACE_S, Catalogue, Row
from tests.oracle import catalogue_view
from tests.s3 import serve_s3

LATER = 4e9  # s since 1970: what is there was merged long before


def source(asked: str, key: str | None, limits: tuple[float, float] | None = None, **more: Any) -> Row:
    status = "quarantined" if key is None else "committed"
    row = {"kind": "source", "asked": asked, "key": key, "status": status, "uri": f"/data/{asked}.tiff", **more}
    return row if limits is None else {**row, "max_seconds": limits[0], "max_gib": limits[1]}


def slide(key: str, n_bad_tiles: int = 0, n_patches: int = 7) -> Row:
    return {"kind": "slide", "key": key, "n_bad_tiles": n_bad_tiles, "n_patches": n_patches, "facts": '{"a":1}'}


def seen(catalogue: Catalogue) -> dict[str, list[dict[str, Any]]]:
    view = catalogue.read()
    return {name: getattr(view, name).to_pylist() for name in ("sources", "slides")}


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(str(tmp_path / "spec"))


def members(catalogue: Catalogue) -> list[str]:
    return files.list_names(catalogue.uri)


def test_an_empty_one_has_nothing(catalogue: Catalogue) -> None:
    view = catalogue.read()
    assert len(view.sources) == len(view.slides) == 0
    assert view.slide_places(["k"]).to_pylist() == [None]
    catalogue.tidy(view)
    catalogue.purge([])
    assert members(catalogue) == []


def test_what_a_group_appends_is_one_file_and_is_found(catalogue: Catalogue) -> None:
    catalogue.append([source("a", "k1"), slide("k1"), source("b", None, reason="no-tissue: none", error="trace")])
    catalogue.append([])
    assert len(members(catalogue)) == 1
    view = catalogue.read()
    assert view.source_places(["b", None, "c", "a"]).to_pylist() == [1, None, None, 0]
    assert view.slides["n_patches"].to_pylist() == [7]
    ids = view.sources["id"].combine_chunks()
    wide = [row for rows in catalogue.wide(view, ["error"], ids) for row in rows.to_pylist()]
    assert sorted((row["id"], row["error"]) for row in wide) == [(ids[0].as_py(), None), (ids[1].as_py(), "trace")]


Step = tuple[str, Any]
KEYS, ASKED = st.sampled_from("klm"), st.sampled_from("abc")
LIMITS = st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([1.0, 2.0]))
ROWS = st.one_of(
    st.builds(slide, KEYS, st.integers(0, 2), st.integers(0, 2)),
    st.builds(source, ASKED, st.one_of(st.none(), KEYS), st.one_of(st.none(), LIMITS)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(ROWS, min_size=1, max_size=3)),
        st.tuples(st.just("forget"), KEYS),
        st.tuples(st.just("tidy"), st.sampled_from([0.0, LATER])),
        st.tuples(st.just("tidy, killed before it deletes"), st.integers(0, 3)),
        st.tuples(st.just("two tidy at once"), st.just(0)),
        st.tuples(st.just("an old file is back"), st.integers(0, 99)),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_appends_merges_and_kills_gives_the_same_view(
    steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The view is that of the rows alone, as the slow twin has it from what was appended and removed."""
    folder = tmp_path_factory.mktemp("c")
    catalogue, old = Catalogue(str(folder / "spec")), folder / "old"
    old.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FAN", 2)
        appended: list[dict[str, Any]] = []
        removed: set[bytes] = set()
        for what, how in steps:
            before = set(members(catalogue))
            if what == "append":
                catalogue.append(how)
                (new,) = set(members(catalogue)) - before
                appended += pq.read_table(folder / "spec" / "catalogue" / new).to_pylist()
            elif what == "forget":
                ids = catalogue.read().ids("slide", "key", [how])
                assert (
                    set(ids)
                    == {row["id"] for row in appended if row["kind"] == "slide" and row["key"] == how} - removed
                )
                catalogue.remove(ids)
                removed |= set(ids)
            else:
                disturb(catalogue, old, what, how)
            for path in (folder / "spec" / "catalogue").glob("*"):
                shutil.copy(path, old)
            view = catalogue.read()
            for name, expected in catalogue_view(appended, removed).items():
                table = getattr(view, name)
                assert table.to_pylist() == [{c: row[c] for c in table.column_names} for row in expected]


def disturb(catalogue: Catalogue, old: Path, what: str, how: Any) -> None:
    """What must not change the view."""
    place = Path(catalogue.uri)
    if what == "tidy":
        catalogue.tidy(catalogue.read(), how)
    elif what == "two tidy at once":
        views = [catalogue.read(), catalogue.read()]
        for view in views:
            catalogue.tidy(view, LATER)
    elif what == "tidy, killed before it deletes":
        there = {path: path.read_bytes() for path in place.glob("*")}
        catalogue.tidy(catalogue.read(), LATER)
        for path, data in itertools.islice(there.items(), how, None):  # it deleted some
            path.write_bytes(data)
    elif paths := sorted(old.glob("*")):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[how % len(paths)], place)


def test_merging_keeps_few_files_and_every_row(catalogue: Catalogue) -> None:
    for number in range(3 * FAN + 2):
        catalogue.append([source(f"a{number}", f"k{number}"), slide(f"k{number}")])
        catalogue.tidy(catalogue.read(), LATER)
    assert len(members(catalogue)) <= FAN + 4
    view = catalogue.read()
    assert len(view.members) <= FAN + 2
    assert sorted(view.slides["key"].to_pylist()) == sorted(f"k{number}" for number in range(3 * FAN + 2))
    ids = view.slides["id"].combine_chunks()
    facts = [row["facts"] for rows in catalogue.wide(view, ["facts"], ids) for row in rows.to_pylist()]
    assert facts == ['{"a":1}'] * (3 * FAN + 2)


def test_what_was_merged_stays_until_nobody_reads_it(catalogue: Catalogue) -> None:
    for number in range(FAN):
        catalogue.append([slide(f"k{number}")])
    first = set(members(catalogue))
    catalogue.tidy(catalogue.read())
    assert first < set(members(catalogue))
    (merged,) = set(members(catalogue)) - first
    assert catalogue.read().members.keys() == {merged}
    written = Path(catalogue.uri, merged).stat().st_mtime
    catalogue.tidy(catalogue.read(), written + GRACE_S)
    assert len(members(catalogue)) == FAN + 1
    catalogue.tidy(catalogue.read(), written + GRACE_S + 1)
    assert members(catalogue) == [merged]


def test_rows_that_are_purged_are_in_no_file(catalogue: Catalogue) -> None:
    catalogue.append([source("a", "k1", reason="of patient p-one"), slide("k1")])
    catalogue.append([source("b", "k2"), slide("k2")])
    view = catalogue.read()
    catalogue.purge([*view.ids("source", "asked", ["a"]), *view.ids("slide", "key", ["k1"])])
    (left,) = members(catalogue)
    rows = pq.read_table(Path(catalogue.uri, left)).to_pylist()
    assert {row["key"] for row in rows if row["kind"] != "removal"} == {"k2"}
    assert [row["asked"] for row in seen(catalogue)["sources"]] == ["b"]


def test_a_hundred_purges_lose_nothing(catalogue: Catalogue) -> None:
    catalogue.append([slide("stays")])
    for number in range(101):
        catalogue.append([source(f"a{number}", None)])
        catalogue.purge(catalogue.read().ids("source", "asked", [f"a{number}"]))
        assert len(members(catalogue)) == 1
    view = catalogue.read()
    assert view.slides["key"].to_pylist() == ["stays"]
    assert len(view.sources) == 0


def test_a_purge_that_was_killed_is_seen_until_it_is_done(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    assert not catalogue.read().holds_removed
    for late in (["_merge", "delete"], ["delete"], []):
        catalogue.append([source("a", "k1", reason="of patient p-one"), slide("k2")])
        assert not catalogue.read().holds_removed
        ids = catalogue.read().ids("source", "asked", ["a"])
        with monkeypatch.context() as patch:
            for name in late:
                patch.setattr(Catalogue, name, killed)
            if late:
                with pytest.raises(KeyboardInterrupt):
                    catalogue.purge(ids)
        assert catalogue.read().holds_removed == bool(late)
        catalogue.purge([] if late else ids)
        assert not catalogue.read().holds_removed
        assert all("p-one" not in str(pq.read_table(path).to_pylist()) for path in Path(catalogue.uri).iterdir())
        assert catalogue.read().slides["key"].to_pylist() == ["k2"]


def test_one_that_another_merges_meanwhile_is_read_again(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine does whose clock is hours ahead: what this one has listed is gone."""
    for number in range(FAN):
        catalogue.append([slide(f"k{number}")])
    catalogue.tidy(catalogue.read())
    (merged,) = catalogue.read().members
    Path(catalogue.uri, merged).rename(Path(catalogue.uri).parent / merged)
    listed = Catalogue._listed

    def slow(self: Catalogue) -> object:
        found = listed(self)
        if (Path(self.uri).parent / merged).exists():
            (Path(self.uri).parent / merged).rename(Path(self.uri, merged))
            for name in found:
                Path(self.uri, name).unlink()
        return found

    monkeypatch.setattr(Catalogue, "_listed", slow)
    assert len(catalogue.read().slides) == FAN


def test_what_is_below_its_folder_is_none_of_it(catalogue: Catalogue) -> None:
    catalogue.append([slide("k")])
    shutil.copytree(catalogue.uri, Path(catalogue.uri, "copy"))
    catalogue.append([slide("l")])
    shutil.rmtree(Path(catalogue.uri).parent / "none", ignore_errors=True)
    for path in Path(catalogue.uri).glob("*.parquet"):
        shutil.copy(path, Path(catalogue.uri, "copy", f"99-{'0' * 32}.parquet"))
    Path(catalogue.uri, "notes.txt").write_text("x")
    assert catalogue.read().slides["key"].to_pylist() == ["k", "l"]
    assert catalogue.broken() == {}


def test_a_file_cut_short_changed_or_of_a_newer_release_is_named(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.append([slide("k")])
    (name,) = members(catalogue)
    path = Path(catalogue.uri, name)
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=rf"{name}: is cut short or was changed; run `pipeline store repair`"):
            catalogue.read()
        assert catalogue.broken().keys() == {name}
    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CATALOGUE", CATALOGUE.with_metadata({b"ips.schema_version": b"99"}))
        catalogue.append([slide("k")])
    with pytest.raises(StorageError, match=r"written by a newer release \(layout 99, .*; update"):
        catalogue.read()
    assert len(catalogue.read(without=catalogue.broken()).slides) == 0


def test_columns_that_an_earlier_release_did_not_know_are_null(catalogue: Catalogue) -> None:
    with pytest.MonkeyPatch.context() as patch:
        known = [field for field in CATALOGUE if field.name != "context_mpp"]
        patch.setattr(module, "CATALOGUE", pa.schema(known, metadata=CATALOGUE.metadata))
        catalogue.append([source("a", "k1"), slide("k1")])
    (old,) = members(catalogue)
    assert "context_mpp" not in pq.read_schema(f"{catalogue.uri}/{old}").names
    catalogue.append([source("b", "k2"), {**slide("k2"), "context_mpp": 2.0}])
    before = seen(catalogue)
    assert [one["context_mpp"] for one in before["slides"]] == [None, 2.0]
    catalogue.purge([])  # which writes them anew
    assert len(members(catalogue)) == 1
    assert seen(catalogue) == before


def test_one_that_was_copied_to_another_spec_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.append([slide("k")])
    shutil.copytree(tmp_path / "spec", tmp_path / "other")
    with pytest.raises(StorageError, match=r"cut by another tiling spec \(spec\), so it was copied or renamed to here"):
        Catalogue(str(tmp_path / "other")).read()


def test_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        catalogue = Catalogue(f"{server.bucket('store')}/patches/spec")
        assert len(catalogue.read().slides) == 0
        for number in range(FAN):
            catalogue.append([slide(f"k{number}")])
        catalogue.tidy(catalogue.read())
        catalogue.tidy(catalogue.read(), LATER)
        assert len(members(catalogue)) == 1
        assert len(catalogue.read().slides) == FAN
