"""What can be wrong with an object store: each failure is told apart, with the variable to mend."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from xml.sax.saxutils import escape

import pytest
from botocore.parsers import create_parser
from botocore.session import get_session
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.storage import files, lease, s3
from pipeline.storage.cloud import ChangedError
from pipeline.storage.s3 import read_page
from tests.faults import Fault, Faults, faulty_s3
from tests.pipeline.storage.claims import check_replaced_only_as_it_was_read, six_that_claim
from tests.s3 import S3Server, serve_s3

Call = Callable[[str], object]
DATA = bytes(range(251)) * 7
CALLS: dict[str, Call] = {
    "exists": files.exists,
    "version": files.source_version,
    "read": files.read_bytes,
    "ranges": lambda uri: files.read_ranges(uri, [(0, 3)]),
    "list": files.list_names,
    "write": lambda uri: files.write_bytes(uri, b"new"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("bucket")
        (server.folder / "bucket" / "file").write_bytes(b"old")
        yield server


@pytest.fixture(autouse=True)
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


@every_call
def test_no_such_bucket(server: S3Server, call: Call) -> None:
    with pytest.raises(StorageError) as caught:
        call("s3://absent-bucket/file")
    assert "s3://absent-bucket/file: bucket absent-bucket does not exist at the endpoint" in str(caught.value)
    assert server.endpoint in str(caught.value)
    assert "create it" in str(caught.value)


@every_call
@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(server: S3Server, call: Call, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "WRONG")
    with pytest.raises(StorageError, match=rf"s3://bucket/file: .*credentials.*check .*{variable}"):
        call("s3://bucket/file")
    assert (server.folder / "bucket" / "file").read_bytes() == b"old"


@every_call
def test_no_credentials(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StorageError, match="s3://bucket/file: no credentials were found; set AWS_ACCESS_KEY_ID"):
        call("s3://bucket/file")


def test_an_unknown_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody.*correct AWS_PROFILE"):
        files.read_bytes("s3://bucket/file")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid:9000"])
def test_a_dead_endpoint_fails_soon(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(s3, "PATIENCE_S", 0.1)
    with pytest.raises(StorageError, match=rf"endpoint \({endpoint}\) cannot be reached .*check AWS_ENDPOINT_URL"):
        files.exists("s3://bucket/file")


@pytest.mark.slow
@pytest.mark.timeout(30)  # four attempts, and the pauses between them
def test_a_silent_endpoint_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(s3, "READ_S", 0.25)
        monkeypatch.setattr(s3, "PATIENCE_S", 0.1)
        with pytest.raises(StorageError, match="cannot be reached"):
            files.exists("s3://bucket/file")


MORE: dict[str, Call] = {
    "download": lambda uri: files.download(uri, Path(os.environ["SCRATCH"]) / "copy"),
    "upload": lambda uri: files.upload(Path(os.environ["SCRATCH"]) / "file", uri),
    "delete": lambda uri: files.delete(uri),
    "versions": lambda uri: files.list_versions(files.parent(uri)),
}


@pytest.fixture
def faults(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faults]:
    """A proxy before the server, which the client takes for it."""
    (tmp_path / "file").write_bytes(DATA)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setattr(s3, "READ_S", 0.25)
    with faulty_s3(server.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint)
        files.write_bytes("s3://bucket/spoilt/file", DATA)
        yield faults


SPOILT: list[tuple[Fault, str]] = [
    *(("reset", name) for name in CALLS | MORE),
    *(("busy", name) for name in ("version", "read", "write")),
    *(("short", name) for name in ("read", "ranges", "download", "list")),
    *(("silent", name) for name in ("read", "write")),
]


@pytest.mark.parametrize(("fault", "name"), SPOILT)
def test_what_may_pass_is_tried_again(fault: Fault, name: str, faults: Faults) -> None:
    call = (CALLS | MORE)[name]
    without = call("s3://bucket/spoilt/file")
    files.write_bytes("s3://bucket/spoilt/file", DATA)
    faults.times(fault, 3 if fault != "silent" else 1)
    assert call("s3://bucket/spoilt/file") == without or isinstance(without, dict)
    assert faults.spoilt == (3 if fault != "silent" else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [("busy", "answers SlowDown"), ("reset", "cannot be reached"), ("short", "breaks off its answers")],
)
def test_what_does_not_pass_is_given_up(
    fault: Fault, words: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.3)
    faults.times(fault, 1000, "GET")
    with pytest.raises(StorageError, match=f"cannot read s3://bucket/spoilt/file: the .*{words}"):
        files.read_ranges("s3://bucket/spoilt/file", [(0, 100), (900, 50)])


def test_a_server_that_restarts_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path) as server, faulty_s3(server.endpoint) as faults:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.bucket("bucket")
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint)
        files.write_bytes("s3://bucket/file", DATA)
        server.kill()
        reader = ThreadPoolExecutor(1).submit(files.read_bytes, "s3://bucket/file")
        while faults.spoilt == 0 and not reader.done():
            time.sleep(0.01)
        with serve_s3(tmp_path) as again:
            faults.upstream = again.endpoint
            assert reader.result(timeout=20) == DATA


def test_an_endpoint_without_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL needs a scheme"):
        files.exists("s3://bucket/file")


def test_tls_on_a_plain_endpoint(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("http:", "https:"))
    with pytest.raises(StorageError, match=r"cannot be reached .*SSL"):
        files.exists("s3://bucket/file")


def test_a_bucket_is_no_file() -> None:
    assert files.exists("s3://bucket")
    with pytest.raises(StorageError, match="s3://bucket: it is a folder; name a file"):
        files.source_version("s3://bucket")
    with pytest.raises(StorageError, match="s3://bucket: it is a bucket; name a file in it"):
        files.read_bytes("s3://bucket")


def test_what_others_write_is_seen(server: S3Server) -> None:
    assert files.list_names("s3://bucket/others") == []
    assert not files.exists("s3://bucket/others/new")
    (server.folder / "bucket" / "others").mkdir()
    for name in ("new", "newer"):
        (server.folder / "bucket" / "others" / name).touch()
        assert files.exists(f"s3://bucket/others/{name}")
        assert name in files.list_names("s3://bucket/others")


def test_checksums_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = "request_checksum_calculation"
    assert s3.client("s3://bucket/file").config_kwargs[chosen] == "when_required"
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_SUPPORTED")
    assert s3.client("s3://bucket/file").config_kwargs[chosen] == "when_supported"


def test_one_client_for_one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3.client("s3://bucket/file")
    assert s3.client("s3://bucket/file") is first
    monkeypatch.setenv("AWS_SESSION_TOKEN", "other")
    assert s3.client("s3://bucket/file") is not first


def test_threads_that_ask_first_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
    together = Barrier(8)

    def ask(_: int) -> int:
        together.wait()
        return id(s3.client("s3://bucket/file"))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1


def test_a_public_bucket_is_asked_without_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    uri = "s3://anonymous@bucket/file"
    assert files.absolute(uri) == uri
    assert files.join(files.parent(uri), "file") == uri
    with serve_s3(server.folder, public=True) as everybodys:
        monkeypatch.setenv("AWS_ENDPOINT_URL", everybodys.endpoint)
        assert files.read_bytes(uri) == b"old"
        assert "file" in files.list_names("s3://anonymous@bucket")
        with pytest.raises(StorageError, match="no credentials were found"):
            files.read_bytes("s3://bucket/file")


def test_patience_outlives_a_server_that_is_away(
    server: S3Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nobody answers there until the second server starts
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "24")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(files.read_bytes, "s3://bucket/file")
        writing = pool.submit(files.write_bytes, "s3://bucket/late", b"new")
        with serve_s3(server.folder, port):
            assert reading.result(60) == b"old"
            writing.result(60)
    assert (server.folder / "bucket" / "late").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("call", "requests"),
    [
        (lambda uri: files.read_bytes(f"{uri}/file"), ["GET"]),
        (lambda uri: files.read_if_there(f"{uri}/file"), ["GET"]),
        (lambda uri: files.read_if_there(f"{uri}/none"), ["GET"]),
        (lambda uri: files.exists(f"{uri}/file"), ["HEAD"]),
        (lambda uri: files.source_version(f"{uri}/file"), ["HEAD"]),
        (lambda uri: files.write_bytes(f"{uri}/new", b"1"), ["PUT"]),
        (lambda uri: files.read_ranges(f"{uri}/file", [(0, 1)]), ["GET"]),
    ],
)
def test_a_call_is_one_request(
    call: Callable[[str], object], requests: list[str], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_s3(server.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint)
        files.list_names("s3://bucket")  # the client looks at the bucket once
        faults.seen.clear()
        call("s3://bucket")
        assert [method for method, *_ in faults.seen] == requests


def test_a_server_that_ignores_conditions_replaces_whatever_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lease` tells by the token who wrote last."""
    with serve_s3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        uri = f"{server.bucket('b')}/claim"
        for data in (b"1", b"2"):
            files.replace(uri, data, None)
            found = files.read_tagged(uri)
            assert found is not None
            assert found[0] == data
        assert s3.Amazon().fetch(uri)[0] == files.source_version(uri).etag
        assert files.read_tagged(f"{uri}-no") is None


def test_a_file_is_replaced_only_while_it_is_what_was_read(strict: dict[str, bytes]) -> None:
    uri = "s3://b/tagged"
    later = check_replaced_only_as_it_was_read(uri)
    strict.clear()
    with pytest.raises(ChangedError):
        files.replace(uri, b"5", later)
    for data in (b"6", b"7"):
        assert files.replace("s3://b/refuses", data, None) is None
    assert strict == {"/b/refuses": b"7"}


def test_of_six_that_claim_at_the_same_moment_one_has_the_lease(strict: dict[str, bytes]) -> None:
    for _ in range(2):  # where no claim is, and where one was given back
        assert six_that_claim("s3://b/lease") == ["held", *["same moment"] * 5]
    assert list(strict) == ["/b/lease"]


@pytest.mark.parametrize("name", ["lost", "refuses"])
def test_beats_go_on_where_an_answer_was_lost_or_conditions_are_refused(
    strict: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, number = files.replace, iter(range(1, 1000))

    def replace(uri: str, data: bytes, tag: str | None) -> str | None:
        written = write(uri, data, tag)
        if name == "lost" and next(number) == 3:
            raise StorageError("cannot write it: the endpoint cannot be reached")
        return written

    monkeypatch.setattr(lease, "replace", replace)
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    given_up = time.monotonic() + 30
    with lease.held(f"s3://b/{name}", "work") as mine:
        while json.loads(strict[f"/b/{name}"])["beats"] < 6:
            assert time.monotonic() < given_up
            time.sleep(0.01)
        mine.check()


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1), max_size=4
    ),
    digest=st.sampled_from(['"a1"', "&quot;a1-2&quot;", None]),
    owner=st.sampled_from(["", "<Owner><ID>o</ID></Owner>"]),
    namespace=st.sampled_from(["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"']),
)
def test_a_page_says_what_botocore_reads_in_it(
    names: list[str], digest: str | None, owner: str, namespace: str
) -> None:
    entries = [
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-29T13:54:0{place}.585Z</LastModified>"
        + ("" if digest is None else f"<ETag>{digest}</ETag>")
        + f"<Size>{place}</Size>{owner}<StorageClass>STANDARD</StorageClass></Contents>"
        for place, name in enumerate(names)
    ]
    folders = "<CommonPrefixes><Prefix>a/</Prefix></CommonPrefixes>"
    body = f"<ListBucketResult{namespace}><IsTruncated>true</IsTruncated>{''.join(entries)}{folders}</ListBucketResult>"
    operation = get_session().get_service_model("s3").operation_model("ListObjectsV2")
    answer = {"status_code": 200, "headers": {}, "context": {}, "body": body.encode()}
    theirs = create_parser("rest-xml").parse(answer, operation.output_shape)
    for entry in theirs.get("Contents", ()):
        entry.pop("Owner", None)
    own: dict[str, Any] = {}
    read_page(answer, own)
    assert {**create_parser("rest-xml").parse(answer, operation.output_shape), **own} == theirs


@pytest.mark.parametrize("body", [b"<half", b"<L><Contents><LastModified>yesterday</LastModified></Contents></L>"])
def test_a_page_that_is_not_understood_is_left_to_botocore(body: bytes) -> None:
    answer, own = {"status_code": 200, "body": body}, dict[str, Any]()
    read_page(answer, own)
    assert (answer["body"], own) == (body, {})
