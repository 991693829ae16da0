"""Listings from names in order say what the server says that they stand in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import s3
from tests.faults import faulty_s3
from tests.listings import Listings
from tests.s3 import serve_s3

NAMES = ["a/1", "a/b/2", "a/b/3", "a-b/4", "a b&<ü>+%41", "b/0/x", "b/0!", "b/00/y", "b/1/y", "c"]
ASKED: list[dict[str, Any]] = [
    {},
    {"MaxKeys": 3},
    {"Prefix": "a"},
    {"Prefix": "b/", "Delimiter": "/"},
    {"Prefix": "b/0", "Delimiter": "/"},
    {"Delimiter": "/", "MaxKeys": 2},
    {"Prefix": "b/", "MaxKeys": 1},
    {"StartAfter": "a/b/2"},
    {"StartAfter": "a/b~", "MaxKeys": 2},
    {"Prefix": "nothing"},
]


def _pages(uri: str, options: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """All pages of one listing: objects, folders, whether there are more. S3 has digests in quotes, rclone not."""
    pages, token = [], dict[str, str]()
    while True:
        page = s3.call(uri, "call_s3", "list_objects_v2", Bucket=uri[5:], **options, **token)
        objects = [
            (one["Key"], one["Size"], one["ETag"].strip('"'), one["LastModified"]) for one in page.get("Contents", ())
        ]
        folders = [one["Prefix"] for one in page.get("CommonPrefixes", ())]
        pages.append((objects, folders, page["IsTruncated"]))
        if not page["IsTruncated"]:
            return pages
        token = {"ContinuationToken": page["NextContinuationToken"]}


def test_pages_are_those_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path) as server, faulty_s3(server.endpoint) as proxy:
        uri = server.bucket("many")
        for name, value in {**server.env, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        for name in NAMES[:-2]:
            path = tmp_path / "many" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        listings = Listings(tmp_path)
        proxy.instead = listings.answer
        _pages(uri, {})
        for name in NAMES[-2:]:  # by the server, after the first look
            s3.call(uri, "pipe_file", f"many/{name}", name.encode())
        s3.call(uri, "rm_file", "many/a-b/4")
        own = [_pages(uri, options) for options in ASKED]
        proxy.instead = lambda method, path: None
        assert own == [_pages(uri, options) for options in ASKED]
        assert [name for name, *_ in own[0][0][0]] == sorted({*NAMES} - {"a-b/4"})
