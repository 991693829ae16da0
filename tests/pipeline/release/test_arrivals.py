from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import StorageError
from pipeline.release import arrivals
from pipeline.release.arrivals import Seen, diff, file_versions, last_seen, look, named, remember
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
    assert found.counts == {"added": 2, "removed": 1, "relabelled": 1, "rescanned": 1, "new_patients": 1}
    assert named(found, now.cohort) == {"added": ["d", "e"], "relabelled": ["a"], "rescanned": ["c"]}
    assert found.removed == (fingerprint("b"),)
    assert before.digest != now.digest


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


def test_a_folder_is_listed_once_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []

    def watched(uri: str) -> dict[str, files.SourceVersion]:
        listed.append(uri)
        return files.list_versions(uri)

    monkeypatch.setattr(arrivals, "list_versions", watched)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    uris = [str(tmp_path / folder / f"{n}.svs") for folder in ("one", "two") for n in range(53)]
    for uri in uris[::2]:
        Path(uri).write_text("x")
    found = file_versions(uris)
    assert sorted(listed) == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert [found[uri] is None for uri in uris] == [False, True] * 53
    assert file_versions([str(tmp_path / "three" / "x.svs")]) == {str(tmp_path / "three" / "x.svs"): None}


def test_companions_of_a_slide_of_several_files_count(tmp_path: Path) -> None:
    (tmp_path / "s.mrxs").write_text("main")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0000.dat").write_text("pixels")
    (before,) = file_versions([str(tmp_path / "s.mrxs")]).values()
    (tmp_path / "s" / "Data0000.dat").write_text("other pixels")
    os.utime(tmp_path / "s.mrxs", (1, 1))
    (now,) = file_versions([str(tmp_path / "s.mrxs")]).values()
    assert None not in (before, now)
    assert before != now
    (tmp_path / "s.mrxs").unlink()
    assert file_versions([str(tmp_path / "s.mrxs")]) == {str(tmp_path / "s.mrxs"): None}


def test_objects_are_told_apart_by_their_etags(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    uri = "s3://slides/new/a b.svs"
    files.write_bytes(uri, b"first")
    (before,) = file_versions([uri]).values()
    files.write_bytes(uri, b"other")
    (now,) = file_versions([uri]).values()
    assert None not in (before, now)
    assert before != now
    with pytest.raises(StorageError, match="nowhere"):
        file_versions(["s3://nowhere/a.svs"])


def test_what_was_seen_comes_back(tmp_path: Path) -> None:
    assert last_seen(str(tmp_path)) is None
    seen = Seen("d", 12.5, 13.0, "held", "c", {"a": ["p", "v", "g", "l"]})
    remember(str(tmp_path), seen)
    assert last_seen(str(tmp_path)) == seen
