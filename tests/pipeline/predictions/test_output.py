from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.data import TaskConfig
from pipeline.errors import StageError
from pipeline.predictions.output import (
    Failure,
    begun_names,
    check_spread,
    commit,
    folder_of,
    forget_models,
    read_facts,
    safe_name,
    write_tables,
)


@pytest.mark.parametrize(
    "slide_id", ["../../etc/passwd", ".hidden", "a/b", "", "x" * 300, "schräg\u2028", "con trol\n", "a\0b", ".."]
)
def test_slide_ids_never_leave_the_folder(slide_id: str, tmp_path: Path) -> None:
    name = safe_name(slide_id) + ".png"
    (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert safe_name(slide_id) != safe_name(slide_id + "_")


def test_plain_slide_ids_stay_as_they_are() -> None:
    assert safe_name("TCGA-3L-AA1B-01Z-00-DX1.8923A151") == "TCGA-3L-AA1B-01Z-00-DX1.8923A151"


def test_a_folder_is_done_when_it_says_so(tmp_path: Path) -> None:
    place = folder_of(str(tmp_path), "a b")
    assert begun_names(str(tmp_path)) == set()
    assert read_facts(place) is None
    commit(place, {"identity": "x"})
    assert read_facts(place) == {"identity": "x"}
    assert begun_names(str(tmp_path)) == {safe_name("a b")}
    (Path(place) / "slide.json").write_text('{"ident')
    assert read_facts(place) is None


def test_models_go_that_no_slide_names_any_more(tmp_path: Path) -> None:
    for digest in ("now", "named", "replaced"):
        (tmp_path / "model" / digest).mkdir(parents=True)
        (tmp_path / "model" / digest / "weights").write_bytes(b"")
    commit(folder_of(str(tmp_path), "a"), {"model": {"digest": "named"}})
    (tmp_path / "slides" / "begun").mkdir()
    forget_models(str(tmp_path), "now")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["named", "now"]


def test_labels_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    tasks = [TaskConfig(name="t", column="label", classes=("no", "yes"))]
    for labels, expected in (([{"t": "yes"}, {}], True), ([{}, {"t": None}], False)):
        write_tables(str(tmp_path), [("a", "a.svs"), ("b", "b.svs")], [Failure("x", "y")] * 2, labels, tasks)
        head = (tmp_path / "predictions.csv").read_text().splitlines()[0]
        assert ('"t_label"' in head) == expected


def test_a_spread_never_takes_the_place_of_an_output() -> None:
    check_spread([TaskConfig(name="t", column="label", classes=("low", "high"))], 5)
    tasks = [TaskConfig(name="t", column="label", kind="multiclass", classes=("a", "a_low", "b"))]
    with pytest.raises(StageError, match="twice: t_a_low, an output and the spread of t_a; predict its models alone"):
        check_spread(tasks, 2)
    check_spread(tasks, 1)
