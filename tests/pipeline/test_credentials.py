from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.credentials import is_secret_variable, masked, masked_value, refusal, secret_within

SECRET = "Pa55-w0rd"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        (f"http://svc:{SECRET}@127.0.0.1:5000/x", "http://***@127.0.0.1:5000/x"),
        (f"https://{SECRET}@github.com/a.git", "https://***@github.com/a.git"),
        (f"postgresql+psycopg2://u:{SECRET}@db:5432/mlflow", "postgresql+psycopg2://***@db:5432/mlflow"),
        (f"postgresql://u@db/x?sslpassword={SECRET}&b=1", "postgresql://u@db/x?sslpassword=***&b=1"),
        (f"s3://AKIA:ab/{SECRET}@bucket/key", "s3://***@bucket/key"),
        (f"s3://anonymous:{SECRET}@bucket/key", "s3://***@bucket/key"),
        (f"http://svc:{SECRET}@b?c#d/e@host", "http://***@host"),
        (f"https://h/a.svs?X-Amz-Signature={SECRET}&v=1", "https://h/a.svs?X-Amz-Signature=***&v=1"),
        (f"s3://b/a.svs?x=1&X-Amz-Security-Token={SECRET}", "s3://b/a.svs?x=1&X-Amz-Security-Token=***"),
        (f"https://acc.blob/c/a.svs?sv=1&sig={SECRET}", "https://acc.blob/c/a.svs?sv=1&sig=***"),
        (f"tracking.uri=svc:{SECRET}@host:5000", "tracking.uri=***@host:5000"),
        (
            f"cannot reach 'http://a:{SECRET}@h', nor http://b:{SECRET}@k",
            "cannot reach 'http://***@h', nor http://***@k",
        ),
    ],
)
def test_credentials_are_masked_and_refused(text: str, without: str) -> None:
    assert masked(text) == without
    problem = refusal(text)
    assert problem is not None
    assert SECRET not in problem
    assert "MLFLOW_TRACKING_PASSWORD" in problem


@pytest.mark.parametrize("password", ["my Pa55-w0rd", "it's Pa55-w0rd", 'a "b" <Pa55-w0rd>', "a\nPa55-w0rd"])
def test_a_value_is_looked_at_whole(password: str) -> None:
    uri = f"http://svc:{password}@host/x"
    assert masked_value(uri) == "http://***@host/x"
    assert masked_value(f"s3://b/k?token={password}&a=1") == "s3://b/k?token=***&a=1"
    assert refusal(uri) is not None


@pytest.mark.parametrize(
    "text",
    [
        "s3://anonymous@bucket/slides@40x/a:b@c.svs",
        "s3://bucket/in come=1, 2/a@b.svs",
        "[s3://a/x, s3://anonymous@b/y]",
        "models:/demo@champion",
        "MLflow at http://127.0.0.1:5000: models:/demo@champion is absent",
        "registry.example.org/ips:1.2@sha256:abc",
        "ips:1.2@sha256:abc",
        "postgresql://mlflow@db/mlflow",
        "wasbs://container@account.blob.core.windows.net/x",
        "http://[::1]:5000/path",
        "sqlite:////a/b.db",
        "/data/tokens=3/a.svs",
        "mail someone@example.org",
        "train.lr=1e-3",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert masked(text) == text


@given(
    st.sampled_from(["http", "https", "s3", "postgresql", "mysql+pymysql"]),
    st.text(st.characters(codec="ascii", exclude_characters=":/?#@"), max_size=5),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
)
def test_no_password_passes(scheme: str, user: str, password: str) -> None:
    uri = f"{scheme}://{user}:QQ{password}QQ@host.example/a"
    assert refusal(uri) is not None
    assert f"QQ{password}QQ" not in masked_value(uri)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "db_password",
        "MYSQL_PWD",
        "OPENAI_API_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_KEY",
    ],
)
def test_secret_variables_are_told_by_their_names(name: str) -> None:
    assert is_secret_variable(name)
    assert secret_within("a-12345678-b", {"HOME": "12345678", name: "12345678"}) == name


@pytest.mark.parametrize(
    "name", ["HOME", "PWD", "OLDPWD", "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "TOKENIZERS_PARALLELISM"]
)
def test_other_variables_are_not(name: str) -> None:
    assert not is_secret_variable(name)
    assert secret_within("12345678", {name: "12345678"}) is None


def test_a_short_secret_is_not_looked_for() -> None:
    assert secret_within("demo", {"DB_PASSWORD": "demo"}) is None
