from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.bags.sources import Source, open_bag, slides_of
from pipeline.bags.streamed import PassingSlide
from pipeline.bags.unseen import as_one, known, read_together, rows_of
from pipeline.errors import PlanError
from pipeline.ingest.isolated import store_slide
from pipeline.ingest.source import version_of
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


def test_files_of_the_catalogue_may_go_while_slide_after_slide_is_asked_for(tmp_path: Path) -> None:
    """As by a tile job beside a batch of hours: what was merged is deleted, though the batch looked before."""
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "no"])
    slide, other = cohort.slides
    bad = replace(slide, slide_id="bad", uri=str(tmp_path / "bad.png"))
    Path(bad.uri).write_bytes(b"no slide")
    root, spec = str(tmp_path / "store"), config.tiling.fingerprint()
    assert store_slide(bad, config.tiling, root).key is None
    writer, asked = PatchStore(root, spec), PatchStore(root, spec)
    status, version = store_slide(slide, config.tiling, root), version_of(slide, config.tiling)
    for number in range(16):  # what other groups commit
        writer.record(replace(slide, slide_id=f"a{number}"), version, status)
    first = known(config, slide, asked)
    assert first is not None
    writer.tidy()
    writer.catalogue.tidy(writer.view, now=time.time() + 3700)
    assert known(config, bad, asked) is None
    assert known(config, slide, asked) == first
    assert known(config, other, asked) is None
    store_slide(other, config.tiling, root)
    asked._looked -= 3600  # of an hour before
    assert known(config, other, asked) is not None


def test_a_patch_that_cannot_be_decoded_has_all_slides_stored_first(tmp_path: Path) -> None:
    config, cohort = small_config(), write_cohort(tmp_path, ["no", "no"])
    seen: list[list[type[Source]]] = []

    def use(sources: Sequence[Source]) -> None:
        seen.append([type(source) for source in sources])
        if len(seen) == 1:
            raise PlanError("key", "no patch")

    read_together(config, cohort.slides, use)
    assert seen == [[PassingSlide] * 2, [StoredSlide] * 2]
