"""Passwords and tokens inside text: how they are told, refused where they are given, and masked in what is said.

Whatever a config, a cohort or a command line holds is recorded: in MLflow, in reports, in the config.json that every
model ships. So no value of theirs may hold a credential; those come from the environment, where MLflow's, AWS's and
PostgreSQL's clients look for them, in each process anew. `refusal` guards the ways in, `masked` the ways out.

A credential is the userinfo of a URI (`http://name:password@host`), a parameter of its query that is called a token,
key, password or signature (as in presigned S3 URLs), or `name:password@host` without a scheme. None are
`s3://anonymous@bucket`, a database's user without a password, and a container in `wasbs://container@account`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s'\"<>]*)")
_ONE_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)  # passwords may hold spaces
_NEXT_URI = re.compile(r"[\s,;|]+[A-Za-z][A-Za-z0-9+.-]*://")
_WITHOUT_SCHEME = re.compile(r"(?<![^\s=,'\"(\[])[\w.+%-]+:(?![/\\])[^\s/@'\"]+@(?!sha256:)(?=[\w\[])")
_SECRET_WORDS = "token|secret|passw|passphrase|signature|credential|api[_-]?key|access[_-]?key"
_NAME = rf"(?P<name>[?&;#](?:[\w.-]*(?:{_SECRET_WORDS})[\w.-]*|sig|key|auth|pwd?|pass)=)"
_PARAMETER = re.compile(rf"{_NAME}[^&;#\s'\"]+", re.IGNORECASE)
_ONE_PARAMETER = re.compile(rf"{_NAME}[^&;#]+", re.IGNORECASE)
_VARIABLE = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|ACCOUNT|PRIVATE|SAS)_?KEY|_(PWD|PASS)$",
    re.IGNORECASE,
)
_TELLING = 8  # characters; a shorter value may stand in a text by chance
_TOKEN_ALONE = {"http", "https", "s3"}  # here a user without a password is a token, or the id of a key

_REMEDY = (
    "put it into the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for "
    "MLflow; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3; AZURE_STORAGE_ACCOUNT_KEY for Azure; PGPASSWORD for "
    "PostgreSQL"
)


def masked(text: str) -> str:
    """The text with *** in place of every credential."""
    return _masked(text, _URI, _PARAMETER)


def masked_value(value: str) -> str:
    """The same of a text that is one URI, whose password may hold spaces and quotes."""
    return _masked(value, _ONE_URI, _ONE_PARAMETER)


def refusal(value: str) -> str | None:
    """Why a value must not be given, and what to do; None where it holds no credential. Does not repeat it."""
    if "@" not in value and "=" not in value:  # as `_masked` asks, without two calls: eight values a row of a million
        return None
    if masked_value(value) == value:
        return None
    return f"holds a password or token, and what is given here is recorded; take it out, and {_REMEDY}"


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable is, by its name, a credential: `DB_PASSWORD`, `HF_TOKEN`."""
    return _VARIABLE.search(name) is not None and not name.upper().endswith(("_ID", "_FILE"))


def secret_within(value: str, environment: Mapping[str, str]) -> str | None:
    """Name of the secret environment variable whose value, of 8 characters or more, stands in a text; None: of none."""
    secrets = (name for name, secret in environment.items() if len(secret) >= _TELLING and secret in value)
    return next((name for name in secrets if is_secret_variable(name)), None)


def _masked(text: str, uri: re.Pattern[str], parameter: re.Pattern[str]) -> str:
    if "@" not in text and "=" not in text:  # the usual case, of a million rows
        return text
    text = uri.sub(_without_userinfo, text)
    text = _WITHOUT_SCHEME.sub("***@", text)
    return parameter.sub(r"\g<name>***", text)


def _without_userinfo(found: re.Match[str]) -> str:
    scheme, whole = found["scheme"], found["rest"]
    another = _NEXT_URI.search(whole)
    rest, others = (whole, "") if another is None else (whole[: another.start()], whole[another.start() :])
    end = _userinfo_end(scheme.lower(), rest)
    shown = rest if end is None else f"***@{rest[end + 1 :]}"
    return f"{scheme}://{shown}{masked_value(others)}"


def _userinfo_end(scheme: str, rest: str) -> int | None:
    """Where in `user:password@host/path` the @ stands; None where there is no credential.

    The last @ of all ends it: passwords with a raw `/`, `?` or `@` are common, though no URI.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.partition("@")
    if at and ":" not in user:
        secret = scheme in _TOKEN_ALONE and (scheme, user) != ("s3", "anonymous")
        return len(user) if secret else None
    return rest.rindex("@") if ":" in authority and "@" in rest else None
