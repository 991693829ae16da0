from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config.embed import EmbedConfig


def test_the_fingerprint_is_of_what_changes_features() -> None:
    plain = EmbedConfig()
    base = plain.fingerprint("weights")
    moved = EmbedConfig.model_validate({"encoder": {"name": "resnet50", "weights": "s3://a/b"}, "batch": 7})
    assert moved.fingerprint("weights") == base
    others = [
        plain.fingerprint(None),
        plain.fingerprint("other"),
        *(
            EmbedConfig.model_validate(change).fingerprint("weights")
            for change in ({"encoder": {"name": "resnet18"}}, {"dtype": "float32"}, {"mean": (0.5, 0.5, 0.5)})
        ),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder": {"name": "features", "features": 9}}, "name a network"),
        ({"mean": (0.5,)}, "patches are RGB"),
        ({"encoder": {"name": "resnet18", "channels": 1}}, "patches are RGB"),
    ],
)
def test_what_cannot_embed_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EmbedConfig.model_validate(change)
