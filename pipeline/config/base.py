"""What every section of the configuration shares: its base class, its field types, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.columnar import BATCH, Columnar
from pipeline.credentials import refusal

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def credential_in(value: object) -> str | None:
    """Why a value, or one of those in a list, must not be given; None where it holds no password or token."""
    texts = [text for text in (value if isinstance(value, list | tuple) else [value]) if isinstance(text, str)]
    return next((problem for text in texts if (problem := refusal(text)) is not None), None)


def fingerprint(value: object) -> str:
    """First 16 hex digits of the sha256 of the value's canonical JSON, in which what is columnar is a list."""
    hasher = hashlib.sha256()
    for piece in _pieces(value):
        hasher.update(piece.encode())
    return hasher.hexdigest()[:16]


def _pieces(value: object) -> Iterator[str]:
    """Canonical JSON; of columnar lists, also those in an object, some thousand items at a time."""
    if isinstance(value, Columnar):
        for start in range(0, max(1, len(value)), BATCH):
            yield ("," if start else "[") + _canonical(list(value[start : start + BATCH]))[1:-1]
        yield "]"
    elif isinstance(value, dict) and any(isinstance(part, Columnar) for part in value.values()):
        for place, key in enumerate(sorted(value)):
            yield ("," if place else "{") + _canonical(key) + ":"
            yield from _pieces(value[key])
        yield "}"
    else:
        yield _canonical(value)


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
"""`json.dumps` with these settings would make an encoder each time, half of the cost of a slide's digests."""


class Section(BaseModel):
    """Base of every section: frozen; unknown keys, NaN, infinity and text that holds a credential are refused.

    So whatever a config is written into, it brings no password there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _without_credentials(cls, value: object) -> object:
        """Of any field, since an address may stand in any; inner sections look at their own."""
        if (problem := credential_in(value)) is not None:
            raise ValueError(problem)
        return value
