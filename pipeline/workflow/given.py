"""The tile stage where other tools have made the features: their files are indexed, and nothing is cut or stored."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bags.given import check_alike
from pipeline.bags.sources import patch_root, patch_store
from pipeline.ingest.features import index_cohort
from pipeline.progress import progress
from pipeline.store.patches import SlideStatus
from pipeline.workflow.stage import Workspace


def index_features(space: Workspace) -> Sequence[SlideStatus]:
    """Say where the vectors are in the cohort's files of features, which no later stage reads whole.

    Raises:
        StageError: they come from several encoders.
        StorageError: the store of plans cannot be written.
    """
    config, slides, store = space.config, space.cohort.slides, patch_store(space.config)
    with progress("tile", len(slides), "files of features") as done:
        statuses = index_cohort(
            slides, config.tiling, patch_root(config), on_status=lambda _: done.advance(), versions=space.versions
        )
    check_alike(store, [status.key for status in statuses if status.key is not None])
    store.tidy()
    return statuses
