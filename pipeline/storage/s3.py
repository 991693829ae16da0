"""Objects on S3: the client, and its failures in words. The only module that knows s3fs and botocore."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any
from xml.etree import ElementTree

from pipeline.errors import StorageError
from pipeline.storage.cloud import ChangedError, Found, SourceVersion
from pipeline.telemetry import note

ANONYMOUS = "anonymous@"
PART_BYTES = 16 << 20  # of a multipart upload; S3 allows 10,000 parts, so one object may have 156 GiB
CONNECT_S = 5.0
READ_S = 15.0  # without a byte; S3 itself answers within seconds
_BAD_CREDENTIALS = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken"}
_NO_CONDITIONS = {"NotImplemented", "InvalidArgument", "InvalidRequest"}  # what is answered to a header that is refused
_NOT_MET = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
PATIENCE_S = 10.0  # a server restarts within seconds
_BUSY = {"500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
_MISSPELT = "it does not exist; check the spelling"
_one_at_a_time = Lock()


def client(uri: str) -> Any:
    """The process's s3fs filesystem for a URI: it is not fork-safe, and the environment may change between calls."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with _one_at_a_time:  # else threads that ask first make one each: 16 MB and 0.2 s of CPU
        return _connect(os.getpid(), tuple(sorted(settings.items())), is_anonymous(uri))


def is_anonymous(uri: str) -> bool:
    """Whether it is written `s3://anonymous@bucket/key`: a public bucket, asked without credentials."""
    return uri.split("://", 1)[1].startswith(ANONYMOUS)


def is_arn(uri: str) -> bool:
    """Whether the bucket is named by an access point's ARN, which has slashes of its own."""
    return key(uri).startswith("arn:")


def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of the URI's client, tried again for `PATIENCE_S` where the failure may pass.

    Such are a busy server and one that restarts. Only for what may be repeated: reads, writes of whole objects.
    """
    kind = str(arguments[0]) if method == "call_s3" else method
    return _patiently(kind, lambda: getattr(client(uri), method)(*arguments, **options))


def fetch(uri: str) -> tuple[str, bytes]:
    """An object's entity tag, as the server writes it, and all its bytes: of one state, by one request."""

    def get() -> tuple[str, bytes]:
        from fsspec.asyn import sync

        filesystem = client(uri)
        answer = filesystem.call_s3("get_object", **_object(uri))
        return str(answer["ETag"]), sync(filesystem.loop, answer["Body"].read)

    found: tuple[str, bytes] = _patiently("get_object", get)
    return found


def _object(uri: str) -> dict[str, str]:
    bucket, name, _ = client(uri).split_path(key(uri))
    return {"Bucket": bucket, "Key": name}


def _patiently(kind: str, work: Callable[[], Any]) -> Any:
    given_up = time.monotonic() + PATIENCE_S
    pause = 0.1
    note(f"requests.{kind}", 1)
    while True:
        try:
            return work()
        except Exception as error:
            if not _may_pass(error) or time.monotonic() + pause > given_up:
                raise
        note("requests.repeated", 1)
        time.sleep(pause * random.uniform(0.5, 1.0))  # many workers should not come back at the same moment
        pause = min(2 * pause, 2.0)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a while."""
    import aiohttp
    from botocore import exceptions as boto

    match error:
        case boto.SSLError():
            return False
        case boto.HTTPClientError() | boto.ConnectionError() | aiohttp.ClientPayloadError() | TimeoutError():
            return True
        case OSError():
            return code(error) in _BUSY
    return False


def key(uri: str) -> str:
    """bucket/key of an S3 URI."""
    path = uri.split("://", 1)[1].removeprefix(ANONYMOUS).rstrip("/")
    if not path or path.startswith("/"):
        raise StorageError(f"{uri}: no bucket is named; write s3://bucket/prefix")
    return path


def code(error: BaseException) -> str | None:
    """S3's error code, which s3fs keeps in the cause of the OSError it raises."""
    response: Mapping[str, Any] = getattr(error.__cause__, "response", {})
    found = response.get("Error", {}).get("Code")
    return None if found is None else str(found)


def reason(error: Exception, uri: str) -> str | None:
    """Why the client failed and what to do; None when the error is not S3's."""
    import aiohttp
    from botocore import exceptions as boto

    match error:
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            return "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        case boto.ProfileNotFound():
            return f"{error}; correct AWS_PROFILE"
        case boto.ParamValidationError() if "/" not in key(uri):
            return "it is a bucket; name a file in it"
        case aiohttp.ClientPayloadError():
            return f"the endpoint ({_endpoint()}) breaks off its answers ({error}); try again, then ask whoever runs it"
        case boto.HTTPClientError() | boto.ConnectionError() | TimeoutError():
            return f"the endpoint ({_endpoint()}) cannot be reached ({error}); check AWS_ENDPOINT_URL and the network"
        case ValueError() if "endpoint" in str(error):
            return f"{error}; AWS_ENDPOINT_URL needs a scheme, as in http://host:port"
        case boto.BotoCoreError():
            return f"{error}; check the bucket's name and the AWS_* variables"
        case OSError():
            return _answer(error, uri)
    return None


def _answer(error: OSError, uri: str) -> str | None:
    """What the server's refusal means."""
    bucket, answer = key(uri).partition("/")[0], code(error)
    match error:
        case PermissionError() if answer in _BAD_CREDENTIALS:
            return f"the server refuses the credentials ({answer}); check {_KEYS}"
        case PermissionError() if answer is not None:
            return (
                f"access denied: the credentials are wrong, or may not do this in bucket {bucket}; check {_KEYS}, "
                "and the bucket's policy"
            )
        case FileNotFoundError() if answer != "NoSuchBucket" and _is_folder(uri):
            return "it is a folder; name a file"
        case FileNotFoundError() if "NoSuchBucket" in (answer, _bucket_code(uri)):
            return (
                f"bucket {bucket} does not exist at the endpoint ({_endpoint()}); create it, or check its name and "
                "AWS_ENDPOINT_URL"
            )
        case FileNotFoundError():
            return _MISSPELT
        case OSError() if answer == "InvalidRange":
            return "it ends before the bytes that are needed; it is truncated or was changed: make it again"
        case OSError() if answer is not None:
            return f"the server answers {answer} ({error}); try again, then ask whoever runs it"
    return None


def _is_folder(uri: str) -> bool:
    """A GET's answer does not tell a folder from nothing at all."""
    try:
        return bool(client(uri).info(key(uri))["type"] == "directory")
    except OSError:  # absent, or the reason is told by the first error
        return False


def _bucket_code(uri: str) -> str | None:
    """NoSuchBucket when that is why nothing was found."""
    try:
        client(uri).ls(key(uri).partition("/")[0] + "/nothing", detail=False)
    except OSError as error:
        return code(error)
    return None


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS itself"


@lru_cache(maxsize=4)
def _connect(pid: int, settings: tuple[tuple[str, str], ...], anonymous: bool) -> Any:  # noqa: FBT001, a cache's key
    import s3fs  # 0.7 s, which processes that work on local files need not pay
    from aiobotocore.session import AioSession

    environment = dict(settings)
    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "retries": {"total_max_attempts": 2, "mode": "standard"},
        "max_pool_connections": 32,
        "request_checksum_calculation": _checksums(environment, "AWS_REQUEST_CHECKSUM_CALCULATION"),
        "response_checksum_validation": _checksums(environment, "AWS_RESPONSE_CHECKSUM_VALIDATION"),
    }
    session = AioSession()
    session.register("before-parse.s3.ListObjectsV2", read_page)
    filesystem = s3fs.S3FileSystem(
        anon=anonymous, skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, session=session
    )
    filesystem.retries = 2  # of requests with their bodies; with s3fs's own 5 a silent endpoint would cost 150 s
    if "AWS_MAX_ATTEMPTS" in environment:  # s3fs pauses 0.1 s * 1.7^n between them, 15 s at most
        filesystem.retries = int(environment["AWS_MAX_ATTEMPTS"])
        s3fs.core.set_custom_error_handler(_passes)
    return filesystem


_READ: dict[str, Callable[[str], Any]] = {"Key": str, "Size": int, "ETag": str, "StorageClass": str}
_READ["LastModified"] = datetime.fromisoformat


def read_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_event: Any) -> None:
    """Read the objects of a listing before botocore does, whose parser takes 60 us for each, a minute for a million."""
    if response_dict["status_code"] != 200:
        return
    try:
        page = ElementTree.fromstring(response_dict["body"])
        objects = [
            {name: _READ[name](part.text or "") for part in node if (name := part.tag.rpartition("}")[2]) in _READ}
            for node in page.iterfind("{*}Contents")
        ]
    except (ElementTree.ParseError, ValueError):  # of a time as S3 does not write it
        return  # to botocore, which reads it, or says why it cannot
    if objects:
        page[:] = [node for node in page if not node.tag.endswith("Contents")]
        response_dict["body"] = ElementTree.tostring(page)
        customized_response_dict["Contents"] = objects


def _passes(error: Exception) -> bool:
    """Whether a server that is away for a while would fail like this; s3fs itself gives up when one refuses to talk."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) >= 500
    return isinstance(error, boto.ConnectionError)


def _checksums(environment: Mapping[str, str], variable: str) -> str:
    return environment.get(variable, "when_required").lower()


class Amazon:
    """S3, and servers that speak as it does. See `Cloud`."""

    def version(self, uri: str) -> SourceVersion | None:
        """See `Cloud`."""
        return _version(call(uri, "info", key(uri)))

    def exists(self, uri: str) -> bool:
        """See `Cloud`."""
        try:
            call(uri, "info", key(uri))
        except FileNotFoundError as error:
            if self.is_missing_bucket(error):
                raise
            return False
        return True

    def read(self, uri: str) -> bytes:
        """See `Cloud`."""
        data: bytes = call(uri, "cat_file", key(uri), max_concurrency=1)  # more would ask for the size first
        return data

    def read_ranges(self, uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Cloud`."""
        starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
        found: list[bytes] = call(uri, "cat_ranges", [key(uri)] * len(ranges), starts, ends, on_error="raise")
        return found

    def fetch(self, uri: str) -> tuple[str, bytes]:
        """See `Cloud`."""
        etag, data = fetch(uri)
        return etag.strip('"'), data

    def write(self, uri: str, data: bytes) -> None:
        """See `Cloud`."""
        call(uri, "pipe_file", key(uri), data, chunksize=PART_BYTES)

    def replace(self, uri: str, data: bytes, tag: str | None) -> str | None:
        """See `Cloud`. Of servers that speak S3 some refuse conditions (None), and some write whatever they are."""
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": f'"{tag}"'}
        try:
            answer = call(uri, "call_s3", "put_object", **_object(uri), Body=data, **condition)
        except OSError as error:
            if code(error) in _NO_CONDITIONS:
                self.write(uri, data)
                return None
            if code(error) in _NOT_MET or (isinstance(error, FileNotFoundError) and not self.is_missing_bucket(error)):
                raise ChangedError(uri) from error
            raise
        return str(answer["ETag"]).strip('"')

    def entries(self, uri: str) -> dict[str, SourceVersion | None]:
        """See `Cloud`."""
        found = call(uri, "ls", key(uri), detail=True)
        named = {str(entry["name"]).rpartition("/")[2]: entry for entry in found}
        return {name: _version(entry) for name, entry in named.items() if name}

    def walk(self, uri: str) -> Iterator[Found]:
        """See `Cloud`."""
        for name, info in call(uri, "find", key(uri), detail=True).items():
            yield Found(f"s3://{name}", info["size"], info["LastModified"].timestamp())

    def delete(self, uri: str) -> None:
        """See `Cloud`."""
        call(uri, "rm_file", key(uri))

    def download(self, uri: str, path: Path) -> None:
        """See `Cloud`."""
        call(uri, "get_file", key(uri), str(path))

    def upload(self, path: Path, uri: str) -> None:
        """See `Cloud`."""
        call(uri, "put_file", str(path), key(uri), chunksize=PART_BYTES)

    def reason(self, error: Exception, uri: str) -> str | None:
        """See `Cloud`."""
        return reason(error, uri)

    def is_missing_bucket(self, error: Exception) -> bool:
        """See `Cloud`."""
        return code(error) == "NoSuchBucket"


def _version(info: Mapping[str, Any]) -> SourceVersion | None:
    if info["type"] == "directory":
        return None
    return SourceVersion(int(info["size"]), str(info["ETag"]).strip('"'), None)
