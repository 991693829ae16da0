from __future__ import annotations

import pyarrow as pa

from pipeline.schema import ATTENTION, INDEX, PATCHES, SCHEMA_VERSION


def test_schemas_carry_their_version_and_hold_no_nulls() -> None:
    for schema in (PATCHES, INDEX, ATTENTION):
        assert schema.metadata == {b"ips.schema_version": str(SCHEMA_VERSION).encode()}
        assert not any(field.nullable for field in schema)


def test_images_may_exceed_two_gigabytes_a_column() -> None:
    assert PATCHES.field("image").type == pa.large_binary()
