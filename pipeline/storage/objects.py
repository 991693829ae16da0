"""Objects on Google Cloud Storage (`gs://bucket/key`) and Azure Blob Storage (`az://container/key`), by obstore.

Accounts, endpoints and credentials come from the clouds' own variables alone: `GOOGLE_APPLICATION_CREDENTIALS`, or what
the machine has, for Google; `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY`, a token or an identity for
Azure. The only module that knows obstore, which is an extra: `pip install "ips-pipeline[clouds]"`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import s3
from pipeline.storage.cloud import ChangedError, Found, SourceVersion
from pipeline.telemetry import note

GAP = 16 * 2**10  # bytes between two ranges that are read along: as `ranges.GAP`
_PART_BYTES = 16 << 20
_AT_ONCE = 4  # parts of an upload, each held in memory
_SETTINGS = ("GOOGLE_", "AZURE_")
_VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_NO_BUCKET = ("ContainerNotFound", "NoSuchBucket", "specified bucket does not exist")


class Objects:
    """Google's and Azure's storage. See `Cloud`."""

    def version(self, uri: str) -> SourceVersion | None:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "head")
        try:
            if name:
                return _version(obstore.head(store, name))
        except FileNotFoundError:
            if not self.entries(uri):  # a HEAD's answer does not tell a folder from nothing, nor from no bucket
                raise
        else:
            self.entries(uri)
        return None

    def exists(self, uri: str) -> bool:
        """See `Cloud`."""
        try:
            self.version(uri)
        except FileNotFoundError as error:
            if self.is_missing_bucket(error):
                raise
            return False
        return True

    def read(self, uri: str) -> bytes:
        """See `Cloud`."""
        return self.fetch(uri)[1]

    def read_ranges(self, uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Cloud`."""
        import obstore

        if not ranges:
            return []
        store, name = _open(uri, "get_ranges")
        starts, lengths = [start for start, _ in ranges], [length for _, length in ranges]
        return [bytes(data) for data in obstore.get_ranges(store, name, starts=starts, lengths=lengths, coalesce=GAP)]

    def fetch(self, uri: str) -> tuple[str, bytes]:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "get")
        answer = obstore.get(store, name)
        return _tag(answer.meta), bytes(answer.bytes())

    def write(self, uri: str, data: bytes) -> None:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "put")
        obstore.put(store, name, data, chunk_size=_PART_BYTES, max_concurrency=_AT_ONCE)

    def replace(self, uri: str, data: bytes, tag: str | None) -> str:
        """See `Cloud`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        store, name = _open(uri, "put")
        etag, _, version = (tag or "").partition(" ")
        known = {"e_tag": f'"{etag}"', **({"version": version} if version else {})}  # Google goes by the version alone
        try:
            made = obstore.put(store, name, data, mode="create" if tag is None else known)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if self.is_missing_bucket(error):
                raise
            raise ChangedError(uri) from error
        return _tag(made)

    def entries(self, uri: str) -> dict[str, SourceVersion | None]:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "list")
        found = obstore.list_with_delimiter(store, name or None)
        folders = {str(path).rstrip("/").rpartition("/")[2]: None for path in found["common_prefixes"]}
        return {**folders, **{str(one["path"]).rpartition("/")[2]: _version(one) for one in found["objects"]}}

    def walk(self, uri: str) -> Iterator[Found]:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "list")
        scheme, bucket = uri.split("://", 1)[0].lower(), s3.key(uri).partition("/")[0]
        for page in obstore.list(store, name or None, chunk_size=1000):
            for one in page:
                yield Found(f"{scheme}://{bucket}/{one['path']}", one["size"], one["last_modified"].timestamp())

    def delete(self, uri: str) -> None:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "delete")
        obstore.delete(store, name)

    def download(self, uri: str, path: Path) -> None:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "get")
        with path.open("xb") as file:
            for data in obstore.get(store, name).stream(min_chunk_size=_PART_BYTES):
                file.write(data)

    def upload(self, path: Path, uri: str) -> None:
        """See `Cloud`."""
        import obstore

        store, name = _open(uri, "put")
        obstore.put(store, name, path, chunk_size=_PART_BYTES, max_concurrency=_AT_ONCE)

    def reason(self, error: Exception, uri: str) -> str | None:
        """See `Cloud`."""
        from obstore import exceptions as told

        scheme, bucket = uri.split("://", 1)[0].lower(), s3.key(uri).partition("/")[0]
        line = str(error).partition("\n\nDebug source")[0].replace("\n", " ")
        match error:
            case FileNotFoundError() | told.BaseError() if self.is_missing_bucket(error):
                return f"bucket {bucket} does not exist; create it, or check its name and {_VARIABLES[scheme]}"
            case FileNotFoundError():
                return self._absent(uri)
            case told.PermissionDeniedError() | told.UnauthenticatedError():
                return (
                    f"access denied: the credentials are wrong, or may not do this in bucket {bucket}; check "
                    f"{_VARIABLES[scheme]}, and the bucket's policy"
                )
            case told.GenericError() if "416" in line or "InvalidRange" in line:
                return "it ends before the bytes that are needed; it is truncated or was changed: make it again"
            case told.GenericError() if "HTTP error" in line or "token request" in line:
                return f"the endpoint cannot be reached ({line}); check the network and {_VARIABLES[scheme]}"
            case told.BaseError():
                return f"the server answers {line}; try again, then ask whoever runs it"
        return None

    def is_missing_bucket(self, error: Exception) -> bool:
        """See `Cloud`."""
        return any(text in str(error) for text in _NO_BUCKET)

    def _absent(self, uri: str) -> str:
        try:
            return "it is a folder; name a file" if self.entries(uri) else "it does not exist; check the spelling"
        except Exception as error:
            if not self.is_missing_bucket(error):
                raise
            return str(self.reason(error, uri))


def _open(uri: str, request: str) -> tuple[Any, str]:
    """The process's client for a bucket, and the object's name in it."""
    scheme, (bucket, _, name) = uri.split("://", 1)[0].lower(), s3.key(uri).partition("/")
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_SETTINGS)))
    note(f"requests.{request}", 1)
    return _connect(os.getpid(), settings, scheme, bucket), name


@lru_cache(maxsize=16)
def _connect(pid: int, settings: tuple[tuple[str, str], ...], scheme: str, bucket: str) -> Any:
    try:
        from obstore.store import AzureStore, GCSStore
    except ModuleNotFoundError as error:
        raise StorageError(
            f'{scheme}://{bucket}: obstore is not installed, which reads it; run: pip install "ips-pipeline[clouds]"'
        ) from error
    plain = any(value.startswith("http://") for _, value in settings)  # an emulator, or a gateway inside a cluster
    client = {
        "connect_timeout": timedelta(seconds=s3.CONNECT_S),
        "read_timeout": timedelta(seconds=s3.READ_S),
        "timeout": timedelta(hours=1),  # of a whole body
        "allow_http": plain,
    }
    retry = {"max_retries": 4, "retry_timeout": timedelta(seconds=s3.PATIENCE_S)}
    try:
        if scheme == "gs":
            return GCSStore(bucket, client_options=client, retry_config=retry)
        return AzureStore(bucket, client_options=client, retry_config=retry)
    except Exception as error:
        line = str(error).partition("\n\nDebug source")[0]
        raise StorageError(f"{scheme}://{bucket}: no client can be made ({line}); set {_VARIABLES[scheme]}") from error


def _version(info: Mapping[str, Any]) -> SourceVersion:
    return SourceVersion(int(info["size"]), str(info["e_tag"]).strip('"'), None)


def _tag(info: Mapping[str, Any]) -> str:
    """What `replace` knows a state by: the entity tag, and the version where there is one."""
    return " ".join(filter(None, [str(info["e_tag"]).strip('"'), info["version"]]))
