"""Reading and checking cohorts."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cohort.table import Cohort, CohortSlide, read_cohort
from pipeline.config.data import TaskConfig
from pipeline.errors import CohortError, StorageError
from pipeline.storage import files
from tests.s3 import S3Server

TUMOR = TaskConfig(name="tumor", column="label")
GRADE = TaskConfig(name="grade", column="isup grade", kind="multiclass", classes=("low", "mid", "none"))
FULL = """slide_id,uri,patient_id,split,mpp,label,isup grade,site
a,slides/a.tiff,p1,train,0.25,1,low,North
"b, é","slides/b, é 50%.tiff",p1,train,,0.0,,"South, ""old"" wing"
001,s3://bucket/x?y=1#z.svs,p2,test,nan, 01 ,none,
c,/data/c.svs,,val,1e-1,,mid,x
"""


def write(folder: Path, text: str, name: str = "cohort.csv") -> str:
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


def problems(uri: str, tasks: Sequence[TaskConfig] = ()) -> tuple[str, ...]:
    with pytest.raises(CohortError) as caught:
        read_cohort(uri, tasks)
    assert caught.value.source == uri
    return caught.value.problems


def check_full(cohort: Cohort, folder: str) -> None:
    a, b, c, d = cohort.slides
    assert [s.slide_id for s in cohort.slides] == ["a", "b, é", "001", "c"]
    assert [s.uri for s in cohort.slides] == [
        f"{folder}/slides/a.tiff",
        f"{folder}/slides/b, é 50%.tiff",
        "s3://bucket/x?y=1#z.svs",
        "/data/c.svs",
    ]
    assert [s.patient_id for s in cohort.slides] == ["p1", "p1", "p2", "c"]
    assert [s.split for s in cohort.slides] == ["train", "train", "test", "val"]
    assert [s.mpp for s in cohort.slides] == [0.25, None, None, 0.1]
    assert [s.labels["tumor"] for s in cohort.slides] == ["1", "0", "1", None]
    assert [s.labels["grade"] for s in cohort.slides] == ["low", None, "none", "mid"]
    assert [s.extra["site"] for s in cohort.slides] == ["North", 'South, "old" wing', "", "x"]
    assert list(a.extra) == ["site"]
    assert cohort.subset("train") == (a, b)
    assert cohort.subset("test") == (c,)
    assert cohort.subset("val") == (d,)


def test_csv(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, FULL), [TUMOR, GRADE])
    check_full(cohort, str(tmp_path))
    windows = write(tmp_path, "\ufeff" + FULL.replace("\n", "\r\n") + "\r\n", "windows.csv")
    assert read_cohort(windows, [TUMOR, GRADE]).slides == cohort.slides
    assert read_cohort(f"file://{tmp_path}/cohort.csv", [TUMOR, GRADE]).slides == cohort.slides


def test_parquet(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(FULL)))
    table = pa.Table.from_pylist([{key: value or None for key, value in row.items()} for row in rows])
    pq.write_table(table, tmp_path / "cohort")
    check_full(read_cohort(str(tmp_path / "cohort"), [TUMOR, GRADE]), str(tmp_path))


def test_parquet_types(tmp_path: Path) -> None:
    columns = {
        "slide_id": pa.array([7, 8, 9]),
        "uri": pa.array(["a", "b", "c"]).dictionary_encode(),
        "mpp": pa.array([0.25, math.nan, None]),
        "series": pa.array([1.0, math.nan, 0.0]),
        "label": pa.array([True, False, True]),
        "grade": pa.array([1.0, math.nan, 0.0]),
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    second = TaskConfig(name="second", column="grade")
    cohort = read_cohort(str(tmp_path / "c.parquet"), [TUMOR, second])
    assert [s.slide_id for s in cohort.slides] == ["7", "8", "9"]
    assert [s.mpp for s in cohort.slides] == [0.25, None, None]
    assert [s.series for s in cohort.slides] == [1, None, 0]
    assert [dict(s.labels) for s in cohort.slides] == [
        {"tumor": "1", "second": "1"},
        {"tumor": "0", "second": None},
        {"tumor": "1", "second": "0"},
    ]


def test_series_are_whole_numbers(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, "slide_id,uri,series\na,x.tif,0\nb,x.tif,2\nc,x.tif,\n"))
    assert [(slide.series, dict(slide.extra)) for slide in cohort.slides] == [(0, {}), (2, {}), (None, {})]
    found = problems(write(tmp_path, "slide_id,uri,series\na,x,-1\nb,x,1.5\nc,x,first\nd,x,inf\ne,x,1e30\n"), [])
    assert found[0] == "row 2: series '-1' is no whole number from 0; write the number of the file's image, as in 1"
    assert [line.partition(":")[0] for line in found] == ["row 2", "row 3", "row 4", "row 5", "row 6"]


def test_without_tasks_labels_are_extra(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, "slide_id,uri,label\na,a.png,odd\n"))
    assert cohort.slides == (CohortSlide("a", f"{tmp_path}/a.png", "a", None, None, {}, {"label": "odd"}),)
    assert not cohort.has_splits


def test_on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    uri = server.bucket("cohorts") + "/deep er/cohort é.csv"
    files.write_bytes(uri, FULL.encode())
    check_full(read_cohort(uri, [TUMOR, GRADE]), "s3://cohorts/deep er")
    with pytest.raises(StorageError, match="bucket gone-bucket does not exist"):
        read_cohort("s3://gone-bucket/cohort.csv")


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = """slide_id,uri,patient_id,split,mpp,label
a,a.png,p1,train,0.25,1
a,b.png,p1,test,zero,maybe

,c.png,p2,dev,-1,nan
d,,p3,,inf,
e,gcs://b/e,p4,train,0,0.5
f,f.png,p5,train
"""
    assert problems(write(tmp_path, text), [TUMOR]) == (
        "row 8: 4 fields, the header has 6; quote values with commas",
        "rows 2, 3: slide_id 'a' is not unique",
        "rows 2, 3: patient 'p1' stands in 2 splits (train, test); keep one",
        "row 3: mpp 'zero' is not a positive number; write microns per level-0 px, as in 0.25",
        "rows 3, 7: column 'label': '0.5' (1 row), 'maybe' (1 row) are not classes of task tumor ('0', '1'); mend the "
        """cells, or set tasks.0.kind=multiclass 'tasks.0.classes=["0.5","1","maybe"]'""",
        "row 5: slide_id is empty",
        "row 5: split 'dev' is not one of 'train', 'val', 'test'",
        "row 5: mpp '-1' is not a positive number; write microns per level-0 px, as in 0.25",
        "rows 5, 6: no label in column 'label'",
        "row 6: uri is empty",
        "row 6: mpp 'inf' is not a positive number; write microns per level-0 px, as in 0.25",
        "row 6: split is empty; give every slide a split, or none of them",
        "row 7: column 'uri': gcs://b/e: gcs:// is not supported; use a path, file://, s3://, gs:// or az://",
        "row 7: mpp '0' is not a positive number; write microns per level-0 px, as in 0.25",
    )


def test_a_label_may_be_missing_where_another_is_known(tmp_path: Path) -> None:
    text = "slide_id,uri,label,isup grade\na,a,,low\nb,b,N/A,null\n"
    assert problems(write(tmp_path, text), [TUMOR, GRADE]) == ("row 3: no label in column 'label', 'isup grade'",)


@pytest.mark.parametrize("unknown", ["", "NA", "nan", "None", "<NA>"])
def test_a_slide_without_a_patient_is_its_own(tmp_path: Path, unknown: str) -> None:
    uri = write(tmp_path, f"slide_id,uri,patient_id\na,a.svs,{unknown}\nb,b.svs,{unknown}\nc,c.svs,p\n")
    assert [slide.patient_id for slide in read_cohort(uri).slides] == ["a", "b", "p"]


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    (slide,) = read_cohort(write(tmp_path, "slide_id,uri,isup grade\na,a,none\n"), [GRADE]).slides
    assert slide.labels == {"grade": "none"}


def test_many_rows_of_one_problem_are_one_line(tmp_path: Path) -> None:
    text = "slide_id,uri,label\n" + "".join(f"s{i},u,9\n" for i in range(1000))
    (line,) = problems(write(tmp_path, text), [TUMOR])
    assert line.startswith("rows 2, 3, 4, ")
    assert " 21 and 980 more: column 'label': '9' (1000 rows) is not a class of task tumor ('0', '1'); name all" in line


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"\n", "missing columns 'slide_id', 'uri', 'label'; found none"),
        (b"slide_id:uri\na:b\n", "missing columns 'slide_id', 'uri', 'label'; found 'slide_id:uri'"),
        (
            b"Slide ID;Uri;label\na;b;1\n",
            "missing columns 'slide_id', 'uri'; found 'Slide ID', 'Uri', 'label'; rename 'Sl",
        ),
        (
            b"slide_id,uri\na,b\n",
            "missing column 'label'; found 'slide_id', 'uri'; name the right one in tasks.0.column",
        ),
        (b"slide_id;uri;label\na;b;x;1\n", "row 2: 4 fields, the header has 3; quote values with semicolons"),
        (b"slide_id\turi\tlabel\na\n", "row 2: 1 field, the header has 3; quote values with tabs"),
        ("slide_id,uri\n".encode("utf-16-le"), "the file holds NUL bytes: it is no text, or UTF-16 without its mark"),
        ("slide_id,uri\n".encode("utf-16")[:-1], "the file ends within a character of UTF-16"),
        (
            b"PK\x03\x04rest",
            "the file is a workbook (xlsx) or archive, not CSV or Parquet; unpack it, or save it as CSV",
        ),
        (gzip.compress(FULL.encode(), mtime=0), "the file is gzipped, not CSV or Parquet"),
        (b"slide_id,uri,label\n", "no rows below the header"),
        (b"slide_id,uri,label,uri\na,b,1,c\n", "column 'uri' stands twice in the header"),
        (b"slide_id,uri,label\na,\xe9.png,1\n", "row 2: byte 0xe9 is not UTF-8; save the file as CSV UTF-8"),
        (b'slide_id,uri,label\na,"b,1\n', "not a CSV file: unexpected end of data"),
        (b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_files_that_are_no_cohort(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "cohort").write_bytes(data)
    (line,) = problems(str(tmp_path / "cohort"), [TUMOR])
    assert line.startswith(expected)


def test_a_missing_column_hides_no_other_problem(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "slide_id,uri,mpp\na,b,x\na,b,1\n"), [TUMOR])
    assert found[0] == "missing column 'label'; found 'slide_id', 'uri', 'mpp'; name the right one in tasks.0.column"
    assert [line.partition(":")[0] for line in found[1:]] == ["row 2", "rows 2, 3"]


@pytest.mark.parametrize(
    ("task", "cells", "expected"),
    [
        (
            TaskConfig(name="tumor", column="label"),
            ["normal", "tumour", "", "normal"],
            "rows 2, 3, 5: column 'label': 'normal' (2 rows), 'tumour' (1 row) are not classes of task tumor ('0', "
            """'1'); set 'tasks.1.classes=["normal","tumour"]', the positive class last""",
        ),
        (
            TaskConfig(name="isup", column="label"),
            ["1", "10", "2", "0"],
            "rows 3, 4: column 'label': '2' (1 row), '10' (1 row) are not classes of task isup ('0', '1'); "
            """mend the cells, or set tasks.1.kind=multiclass 'tasks.1.classes=["0","1","2","10"]'""",
        ),
        (
            TaskConfig(name="tumor", column="label", classes=("it's", "b")),
            ["it's", "b", "B"],
            "row 4: column 'label': 'B' (1 row) is not a class of task tumor (\"it's\", 'b'); mend the cells, or set "
            """tasks.1.kind=multiclass 'tasks.1.classes=["B","b","it'"'"'s"]'""",
        ),
        (
            TaskConfig(name="found", column="label", kind="multilabel"),
            ["necrosis;mitoses", "-", "pen;necrosis"],
            "rows 2, 4: column 'label': 'mitoses' (1 row), 'necrosis' (2 rows), 'pen' (1 row) are not classes "
            """of task found ('0', '1'); mend the cells, or set 'tasks.1.classes=["mitoses","necrosis","pen"]'""",
        ),
        (
            TaskConfig(name="age", column="label"),
            [str(20 + n) for n in range(25)],
            "rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21 and 5 more: column 'label': "
            + ", ".join(f"'{20 + n}' (1 row)" for n in range(20))
            + " and 5 more are not classes of task age ('0', '1'); name a column of classes in tasks.1.column, or set "
            "tasks.1.kind=regression",
        ),
    ],
    ids=["words", "grades", "typo", "multilabel", "numbers"],
)
def test_values_that_are_no_classes_are_listed_ready_to_paste(
    tmp_path: Path, task: TaskConfig, cells: Sequence[str], expected: str
) -> None:
    other = TaskConfig(name="other", column="known")
    text = "slide_id,uri,label,known\n" + "".join(f's{n},u{n},"{cell}",1\n' for n, cell in enumerate(cells))
    assert problems(write(tmp_path, text), [other, task]) == (expected,)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.csv: it does not exist"):
        read_cohort(str(tmp_path / "gone.csv"))
    with pytest.raises(StorageError, match="it is a folder; name a file"):
        read_cohort(str(tmp_path))


def test_the_digest_follows_what_decides_a_result(tmp_path: Path) -> None:
    cohort = read_cohort(write(tmp_path, FULL), [TUMOR, GRADE])
    assert cohort.digest == replace(cohort, uri="elsewhere").digest
    assert len(cohort.digest) == 64
    changes: list[Mapping[str, object]] = [
        {"slide_id": "z"},
        {"uri": "z"},
        {"patient_id": "z"},
        {"split": "val"},
        {"split": None},
        {"mpp": 0.26},
        {"series": 1},
        {"labels": {"tumor": "0", "grade": "low"}},
    ]
    variants = [
        replace(cohort, slides=(replace(cohort.slides[0], **change), *cohort.slides[1:]))  # type: ignore[arg-type]
        for change in changes
    ]
    assert len({cohort.digest, *(variant.digest for variant in variants)}) == len(changes) + 1
    other = replace(cohort, slides=(replace(cohort.slides[0], extra={"site": "z"}), *cohort.slides[1:]))
    assert other.digest == cohort.digest


def test_a_credential_in_any_column_is_refused_and_not_repeated(tmp_path: Path) -> None:
    rows = [
        "a,https://h/a.svs?X-Amz-Signature=Pa55,p,0,",
        "b,s3://KEY:Pa55@b/b.svs,http://u:Pa55@h,0,x",
        "c,c.svs,p,http://u:my Pa55@h,s3://anonymous@b/m.png",
    ]
    uri = write(tmp_path, "slide_id,uri,patient_id,label,mask\n" + "\n".join(rows) + "\n")
    found = problems(uri, [TUMOR])
    assert not any("Pa55" in problem for problem in found)
    starts = ["rows 2, 3: column 'uri': holds", "row 3: column 'patient_id': holds", "row 4: column 'label': holds"]
    assert all(problem.startswith(start) for problem, start in zip(found, [*starts, "row 4: no label"], strict=True))


def test_a_folder_in_a_cloud_keeps_its_mark(tmp_path: Path) -> None:
    uri = write(tmp_path, "slide_id,uri\na,s3://b/case/\nb,case/1.2.840/\nc,/d/case/\n")
    assert [slide.uri for slide in read_cohort(uri).slides] == ["s3://b/case/", f"{tmp_path}/case/1.2.840", "/d/case"]
