"""What is kept of a decision stands in `test_judge`, where there is one; here what names slides."""

from __future__ import annotations

from pipeline.release.archive import _changes


def test_changes_are_a_row_a_slide() -> None:
    changed = {"counts": {"added": 2}, "slides": {"added": ["a", "=b"], "relabelled": ["c"]}}
    assert _changes(changed).decode().splitlines() == [
        '"slide_id","change"', '"a","added"', "\"'=b\",\"added\"", '"c","relabelled"',
    ]  # fmt: skip
    assert _changes({"counts": {}, "slides": {}}).decode().splitlines() == ['"slide_id","change"']
