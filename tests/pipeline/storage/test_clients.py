from __future__ import annotations

import pytest

from pipeline.errors import StorageError
from pipeline.storage.clients import cloud, is_remote
from pipeline.storage.files import absolute
from pipeline.storage.objects import Objects
from pipeline.storage.s3 import Amazon


@pytest.mark.parametrize(
    ("uri", "kind"), [("s3://b/k", Amazon), ("S3://b/k", Amazon), ("gs://b/k", Objects), ("az://b/k", Objects)]
)
def test_the_scheme_says_which_client(uri: str, kind: type) -> None:
    assert is_remote(uri)
    assert isinstance(cloud(uri), kind)
    assert absolute(uri + "/") == uri.lower()


@pytest.mark.parametrize("uri", ["gcs://b/k", "abfs://b/k", "http://h/k"])
def test_another_scheme_is_refused_with_those_there_are(uri: str) -> None:
    with pytest.raises(StorageError, match="use a path, file://, s3://, gs:// or az://"):
        is_remote(uri)


def test_a_signature_is_refused_unseen() -> None:
    with pytest.raises(StorageError, match="holds a password or token") as error:
        is_remote("az://container/key?sv=2021&sig=c2VjcmV0c2VjcmV0")
    assert "c2VjcmV0" not in str(error.value)
