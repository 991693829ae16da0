from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.results.limits import Limits, host_limits
from tests.dicom import write_series
from tests.synth import tissue_rgb


def _admits(limits: Limits, uri: str) -> bool:
    try:
        return bool(limits.admit(uri))
    except StorageError as error:
        return "IPS_ALLOWED_ROOTS" not in str(error)


def test_without_variables_a_process_of_ones_own_is_not_limited() -> None:
    assert host_limits({}) == Limits()
    assert Limits().admit("/etc/hosts") == "/etc/hosts"


def test_a_server_is_limited_and_gives_up_before_mlflow_does() -> None:
    serving = {"_MLFLOW_IS_IN_SERVING_ENVIRONMENT": "true"}
    assert host_limits(serving) == Limits(None, 64, 48)
    assert host_limits({**serving, "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "600"}).seconds == 480
    own = {"IPS_MAX_ROWS": "3", "IPS_MAX_SECONDS": "2.5", "IPS_ALLOWED_ROOTS": ""}
    assert host_limits({**serving, **own}) == host_limits(own) == Limits((), 3, 2.5)


@pytest.mark.parametrize("text", ["", " ", ","])
def test_no_root_allows_nothing(text: str) -> None:
    assert not _admits(host_limits({"IPS_ALLOWED_ROOTS": text}), "/etc/hosts")


def test_local_roots_follow_links_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "real, not").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.svs").touch()
    (tmp_path / "realistic.svs").touch()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    limits = host_limits({"IPS_ALLOWED_ROOTS": f" {tmp_path / 'root'} , s3://b/p"})
    for uri in ("root/a.svs", "real/a.svs", "real/absent.svs"):
        assert limits.admit(str(tmp_path / uri)) == str(tmp_path / uri)
    assert limits.admit(f"{tmp_path}/root/b/../a.svs") == f"{tmp_path}/root/a.svs"
    assert _admits(limits, f"file://{tmp_path}/root/a.svs")
    for uri in ("realistic.svs", "real, not/a.svs", "root/../realistic.svs", "a.svs"):
        assert not _admits(limits, str(tmp_path / uri))
    (tmp_path / "real" / "link.svs").symlink_to(tmp_path / "realistic.svs")
    assert not _admits(limits, str(tmp_path / "root" / "link.svs"))


@pytest.mark.parametrize(
    ("uri", "is_in"),
    [
        ("s3://b/p/a.svs", True),
        ("S3://b/p/x/a.svs", True),
        ("s3://anonymous@b/p/a.svs", True),
        ("s3://b/p", True),
        ("s3://b/pq/a.svs", False),
        ("s3://b/a.svs", False),
        ("s3://b/p/../a.svs", False),
        ("s3://b/p/./a.svs", False),
        ("s3://c/p/a.svs", False),
        ("gs://b/p/a.svs", False),
        ("/p/a.svs", False),
    ],
)
def test_prefixes_end_at_a_folder(uri: str, is_in: bool) -> None:  # noqa: FBT001
    assert _admits(host_limits({"IPS_ALLOWED_ROOTS": "/q,s3://b/p/"}), uri) is is_in


def test_every_file_of_a_slide_lies_in_a_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "a.mrxs").touch()
    (root / "a" / "Slidedat.ini").touch()
    limits = host_limits({"IPS_ALLOWED_ROOTS": str(root)})
    assert _admits(limits, str(root / "a.mrxs"))
    (outside / "Data0000.dat").touch()
    (root / "a" / "Data0000.dat").symlink_to(outside / "Data0000.dat")
    assert not _admits(limits, str(root / "a.mrxs"))
    shutil.rmtree(root / "a")
    (root / "a").symlink_to(outside)
    assert not _admits(limits, str(root / "a.mrxs"))


def test_every_file_of_a_folder_that_is_a_slide_lies_in_a_root(tmp_path: Path) -> None:
    write_series(tmp_path / "root" / "slide", tissue_rgb(31, 23))
    (_, other) = write_series(tmp_path / "outside", tissue_rgb(31, 23))
    limits = host_limits({"IPS_ALLOWED_ROOTS": f"{tmp_path / 'root'},s3://b/p"})
    assert limits.admit(str(tmp_path / "root" / "slide")) == str(tmp_path / "root" / "slide")
    assert not _admits(limits, str(tmp_path / "outside"))
    (tmp_path / "root" / "slide" / "1.dcm").unlink()
    (tmp_path / "root" / "slide" / "1.dcm").symlink_to(other)
    assert not _admits(limits, str(tmp_path / "root" / "slide"))
    assert Limits().admit("S3://b/p/slide/") == "s3://b/p/slide/"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("IPS_MAX_ROWS", "many"),
        ("IPS_MAX_ROWS", "0"),
        ("IPS_MAX_SECONDS", "nan"),
        ("IPS_MAX_SECONDS", "-1"),
        ("IPS_ALLOWED_ROOTS", "gcs://b"),
        ("IPS_ALLOWED_ROOTS", "/a, s3://KEY:Pa55@b"),
    ],
)
def test_what_is_no_limit_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        host_limits({name: text})
    assert "Pa55" not in str(caught.value)
