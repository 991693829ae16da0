from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.tissue import TissueModelConfig

NETWORK = {
    "uri": "a.pt",
    "sha256": "0" * 64,
    "mpp": 8.0,
    "classes": ["glass", "tissue"],
    "tissue": ["tissue"],
    "tile": 64,
    "overlap": 8,
}


def test_where_the_network_lies_is_no_part_of_what_it_is() -> None:
    one = TissueModelConfig.model_validate(NETWORK)
    assert TissueModelConfig.model_validate({**NETWORK, "uri": "s3://b/c.pt"}).identity() == one.identity()
    assert one.identity()["sha256"] == "0" * 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sha256": ""}, "give the 64 digits that `sha256sum` prints"),
        ({"sha256": "ABC"}, "give the 64 digits that `sha256sum` prints"),
        ({"tissue": ["fat"]}, r"tissue: fat is none of classes \['glass', 'tissue'\]"),
        ({"tissue": ["glass", "tissue"]}, "tissue names all classes"),
        ({"classes": ["tissue", "tissue"]}, "classes and tissue name each class once"),
        ({"overlap": 32}, "overlap=32 must be less than half of tile=64"),
        ({"mpp": 0}, "greater than 0"),
        ({"threshold": 1}, "less than 1"),
        ({"std": [1, 0, 1]}, "greater than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TissueModelConfig.model_validate({**NETWORK, **fields})
