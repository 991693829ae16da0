from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StorageError
from pipeline.release.arrivals import Seen, contents, diff, last_contents, last_seen, look, named, remember
from pipeline.storage import files
from tests.pipeline.small import small_config
from tests.s3 import S3Server


def _cohort(folder: Path, rows: dict[str, tuple[str, str]]) -> Config:
    """Slide id -> patient and label; a file of its name for each, which stays where it is there."""
    folder.mkdir(exist_ok=True)
    for name in rows:
        if not (folder / f"{name}.tif").exists():
            (folder / f"{name}.tif").write_text(f"slide {name}")
    lines = [f"{name},{name}.tif,{patient},{label}" for name, (patient, label) in rows.items()]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,uri,patient_id,label", *lines]) + "\n")
    return small_config(cohort={"uri": str(folder / "cohort.csv")}, gate={"approval": True})


FIRST = {"a": ("p1", "no"), "b": ("p1", "yes"), "c": ("p2", "no")}


def test_what_happened_to_a_cohort_is_told_by_kind(tmp_path: Path) -> None:
    before = look(_cohort(tmp_path, FIRST))
    assert look(_cohort(tmp_path, FIRST)) == before
    assert before.there == {fingerprint(name) for name in FIRST}
    (tmp_path / "c.tif").write_text("scanned again")
    now = look(_cohort(tmp_path, {"a": ("p1", "yes"), "c": ("p2", "no"), "d": ("p3", "no"), "e": ("p2", "no")}))
    found = diff(before.rows, now.rows)
    counts = {"added": 2, "removed": 1, "renamed": 0, "relabelled": 1, "rescanned": 1, "new_patients": 1}
    assert found.counts == counts
    assert named(found, now.cohort) == {"added": ["d", "e"], "renamed": [], "relabelled": ["a"], "rescanned": ["c"]}
    assert found.removed == (fingerprint("b"),)
    assert before.digest != now.digest


def test_a_slide_of_the_same_content_is_the_same_under_whatever_name(tmp_path: Path) -> None:
    before = look(_cohort(tmp_path, FIRST))
    held = contents({"a": "ka", "b": "kb", "c": "kc"})
    (tmp_path / "a.tif").touch()
    rows = {"a": ("p1", "no"), "b2": ("p1-again", "no"), "c": ("p2", "no"), "c2": ("p2", "no"), "d": ("p3", "no")}
    now = look(_cohort(tmp_path, rows))
    keys = {"a": "ka", "b2": "kb", "c": "other", "c2": "kc"}  # d was not committed; c2 is a copy of what c was
    found = diff(before.rows, now.rows, held, contents(keys))
    counts = {"added": 2, "removed": 0, "renamed": 1, "relabelled": 1, "rescanned": 1, "new_patients": 1}
    assert found.counts == counts
    assert named(found, now.cohort) == {
        "added": ["c2", "d"],
        "renamed": ["b2"],
        "relabelled": ["b2"],
        "rescanned": ["c"],
    }
    blind = diff(before.rows, now.rows)
    assert (blind.counts["added"], blind.counts["removed"], blind.counts["renamed"]) == (3, 1, 0)


@pytest.mark.parametrize("changes", [{"seed": 3}, {"gate": {"floors": [{"measure": "auc", "bound": 0.5}]}}])
def test_other_settings_are_something_new(tmp_path: Path, changes: dict[str, object]) -> None:
    config = _cohort(tmp_path, FIRST)
    other = Config.model_validate({**config.model_dump(), **changes})
    assert look(config).digest != look(other).digest
    waits = Config.model_validate({**config.model_dump(), "retrain": {"expect_new_within": "8d"}})
    assert look(config).digest == look(waits).digest


def test_a_row_whose_file_is_not_there_has_not_arrived(tmp_path: Path) -> None:
    config = _cohort(tmp_path, FIRST)
    (tmp_path / "b.tif").unlink()
    without = look(config)
    assert without.there == {fingerprint("a"), fingerprint("c")}
    (tmp_path / "b.tif").write_text("here at last")
    assert diff(without.rows, look(config).rows).rescanned == (fingerprint("b"),)


def test_files_of_which_none_can_be_reached_are_no_cohort_that_changed(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    lines = [f"{name},s3://nowhere/{name}.svs,no" for name in ("a", "b")]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri,label", *lines]) + "\n")
    with pytest.raises(StorageError, match="none of the cohort's 2 files can be reached, such as: .*nowhere"):
        look(small_config(cohort={"uri": str(tmp_path / "cohort.csv")}))


def test_objects_are_told_apart_by_their_etags(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cohort.csv").write_text("slide_id,uri,label\na,s3://slides/new/a b.svs,no\n")
    config = small_config(cohort={"uri": str(tmp_path / "cohort.csv")})
    files.write_bytes("s3://slides/new/a b.svs", b"first")
    before = look(config)
    files.write_bytes("s3://slides/new/a b.svs", b"other")
    assert diff(before.rows, look(config).rows).rescanned == (fingerprint("a"),)


def test_what_was_seen_comes_back(tmp_path: Path) -> None:
    assert last_seen(str(tmp_path)) is None
    assert last_contents(str(tmp_path)) == {}
    seen = Seen("d", 12.5, 13.0, "held", "c", {"a": ["p", "v", "g", "l"]})
    remember(str(tmp_path), seen, {"a": "k"})
    assert last_seen(str(tmp_path)) == seen
    assert last_contents(str(tmp_path)) == {"a": "k"}
