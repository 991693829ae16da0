from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.datasets.made import feature_store, patch_store


@pytest.fixture(scope="package")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """See `patch_store`."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch_store(tmp_path_factory.mktemp("datasets"), patch)


@pytest.fixture(scope="package")
def features(patches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `feature_store`."""
    return feature_store(patches, tmp_path_factory.mktemp("features"))
