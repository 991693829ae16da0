from __future__ import annotations

import json

import pyarrow as pa

from pipeline.columnar import Columnar
from pipeline.config.base import fingerprint
from pipeline.workflow.changes import Labels, changes, items, slides_of


def _identity(*rows: list[str]) -> dict[str, object]:
    return {"recipe": {"seed": 0}, "store": "s3://b", "train": [[*row[:-1], Labels(tumour=row[-1])] for row in rows]}


def test_slides_are_named_by_what_happened_to_them() -> None:
    before = items(_identity(["a", "k1", "no"], ["b", "k2", "yes"], ["c", "k3", "no"], ["d", "k4", "no"]))
    kept = json.dumps(before)
    before = json.loads(kept)
    now = items(_identity(["e", "k5", "no"], ["a", "k1", "yes"], ["b", "k9", "no"], ["d", "k4", "no"]))
    assert changes("train", before, now, "abcde") == "train (1 added: e; 1 removed: c; 1 changed: b; 1 relabelled: a)"
    assert changes("recipe", before, now, "abcde") == "recipe"


def test_a_record_names_no_slide_so_that_erasing_leaves_none() -> None:
    before = items(_identity(["patient-7", "k1", "no"], ["patient-8", "k1", "no"]))
    assert "patient" not in json.dumps(before)
    assert changes("train", before, {"train": {}}, []) == "train (2 removed)"
    assert changes("train", before, {"train": {}}, ["patient-8"]) == "train (2 removed: patient-8 and 1 more)"


def test_the_first_twenty_are_named_and_the_others_counted() -> None:
    now = items(_identity(*([f"s{n}", "k", "no"] for n in range(1500))))
    (part,) = now
    assert changes("train", {"train": {}}, now, [f"s{n}" for n in range(1500)]) == (
        f"train (1,500 added: {', '.join(f's{n}' for n in range(20))} and 1,480 more)"
    )
    assert part == "train"


def test_an_order_is_all_that_changed() -> None:
    one, other = (
        items(_identity(["a", "k", "no"], ["b", "l", "no"])),
        items(_identity(["b", "l", "no"], ["a", "k", "no"])),
    )
    assert changes("train", one, other, "ab") == "train (in another order)"


def test_a_record_without_names_tells_the_part() -> None:
    assert changes("train", {}, items(_identity(["a", "k", "no"])), "a") == "train"


def test_slides_of_an_older_record_are_compared_too() -> None:
    now = items(_identity(["a", "k1", "yes"], ["b", "k9", "no"], ["e", "k5", "no"]))
    rows = [["c", "k3", "no"], ["b", "k2", "no"], ["a", "k1", "no"]]
    old = {
        fingerprint(name): [fingerprint([key])[:8], fingerprint([{"tumour": label}])[:8]] for name, key, label in rows
    }
    told = "train (1 added: e; 1 removed: c; 1 changed: b; 1 relabelled: a)"
    assert (
        changes("train", {"train": old}, now, "abcde")
        == told
        == changes("train", items(_identity(*rows)), now, "abcde")
    )
    assert slides_of({"train": old}, "train") == slides_of(items(_identity(*rows)), "train") == sorted(old)


def test_of_another_layout_only_who_came_and_went_is_told() -> None:
    before, other = (items(_identity(*([name, key, "no"] for name in "abc"))) for key in ("k1", "k2"))
    assert changes("train", before, other, "abc") == "train (3 changed: a, b, c)"
    assert changes("train", before, other, "abc", same_layout=False) == ""
    fewer = items(_identity(["a", "k2", "yes"], ["d", "k2", "no"]))
    assert changes("train", before, fewer, "abcd", same_layout=False) == "train (1 added: d; 2 removed: b, c)"
    assert changes("recipe", before, other, "abc", same_layout=False) == "recipe"


def test_a_list_in_columns_is_a_list() -> None:
    rows: list[list[str | None]] = [["a", "k1"], ["b", None]]
    schema = pa.schema([("slide_id", pa.string()), ("asked", pa.string())])
    held = {"slides": Columnar.of(rows, schema, lambda *values: list(values)), "store": "s3://b"}
    assert items(held) == items({"slides": rows, "store": "s3://b"})
    assert fingerprint(held) == fingerprint({"slides": rows, "store": "s3://b"})
    assert fingerprint(Columnar.of([], schema, list)) == fingerprint([])
