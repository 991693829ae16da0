from __future__ import annotations

import pytest

from pipeline.config.base import fingerprint


def test_fingerprint_ignores_key_order_and_refuses_nan() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})
