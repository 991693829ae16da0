from __future__ import annotations

from pipeline.slides.names import apart, name_of


def test_a_file_is_called_without_its_suffix_and_a_folder_by_its_whole_name() -> None:
    assert name_of("s3://bucket/a.b.svs", folder=False) == "a.b"
    assert name_of("/slides/1.2.840", folder=True) == "1.2.840"
    assert name_of("s3://bucket/1.2.840/", folder=True) == "1.2.840"


def test_no_name_is_given_twice() -> None:
    taken = {"a", "a-3"}
    assert list(apart(["a", "b", "a", "b", "b-2"], taken)) == ["a-2", "b", "a-4", "b-2", "b-2-2"]
    assert taken == {"a", "a-2", "a-3", "a-4", "b", "b-2", "b-2-2"}
