from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.bags.sources import Source, open_bag, slides_of
from pipeline.bags.streamed import PassingSlide
from pipeline.bags.unseen import as_one, read_together, rows_of
from pipeline.errors import PlanError
from pipeline.store.patches import PatchStore, StoredSlide
from tests.pipeline.small import small_config, store_slides, write_cohort


def test_slides_that_are_cut_while_they_are_read_have_the_patches_of_the_store(tmp_path: Path) -> None:
    """In one bag, slide after slide; from a store where it has them."""
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "no"])
    stored = [source for _, source in store_slides(cohort, tmp_path / "store", config)]
    store = PatchStore(str(tmp_path / "store"), config.tiling.fingerprint())

    def payloads(sources: Sequence[Source]) -> tuple[list[type[Source]], list[bytes]]:
        whole = as_one(cohort.slides, sources)
        assert [source.key for source in sources] == [source.key for source in stored]
        assert len(open_bag(whole, threads=1, augment=None)) == whole.n_patches
        return [type(source) for source in slides_of(whole)], whole.payloads(np.arange(whole.n_patches))

    wanted = [one for source in stored for one in source.payloads(np.arange(source.n_patches))]
    assert read_together(config, cohort.slides, payloads) == ([PassingSlide, PassingSlide], wanted)
    assert read_together(config, cohort.slides, payloads, store) == ([StoredSlide, StoredSlide], wanted)
    first, second = (source.n_patches for source in stored)
    assert rows_of(stored) == [slice(0, first), slice(first, first + second)]


def test_a_patch_that_cannot_be_decoded_has_all_slides_stored_first(tmp_path: Path) -> None:
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "no"])
    seen: list[list[type[Source]]] = []

    def use(sources: Sequence[Source]) -> None:
        seen.append([type(source) for source in sources])
        if len(seen) == 1:
            raise PlanError("key", "no patch")

    read_together(config, cohort.slides, use)
    assert seen == [[PassingSlide] * 2, [StoredSlide] * 2]
