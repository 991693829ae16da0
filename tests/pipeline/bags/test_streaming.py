from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ips.bag import Bag
from ips.network.model import IPSModel
from ips.selection.select import select
from ips.selection.transfer import arrived
from pipeline.bags import streaming
from pipeline.bags.augment import Augment
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.streamed import StreamedSlide
from pipeline.bags.streaming import Feed
from pipeline.errors import SlideError, StageError
from pipeline.model.build import build_model
from pipeline.store.patches import StoredSlide
from tests.pipeline.bags.test_streamed import stream_slides
from tests.pipeline.small import small_config, store_slides, write_cohort, write_slide

# Ray Data leaves a dataset's log file to the garbage collector when the next dataset begins.
CPU = torch.device("cpu")
LOG_FILE = "ignore:Exception ignored in.*ray-data:pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings(LOG_FILE)]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StreamedSlide], list[StoredSlide]]:
    """The same five slides, streamed and stored."""
    folder = tmp_path_factory.mktemp("slides")
    cohort = write_cohort(folder, ["no", "yes"] * 2 + ["no"])
    stored = [source for _, source in store_slides(cohort, folder / "store", small_config())]
    return stream_slides(cohort, folder / "store", small_config().tiling), stored


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks a slide and blocks a task, as large slides have them."""
    monkeypatch.setattr(streaming, "TASK_PATCHES", 7)
    monkeypatch.setattr(streaming, "BLOCK_PATCHES", 3)


@pytest.fixture
def model() -> IPSModel:
    torch.manual_seed(3)
    return build_model(small_config())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session", "small_tasks")
def test_two_ranks_get_whole_slides_in_order_and_select_as_from_the_store(
    kinds: tuple[list[StreamedSlide], list[StoredSlide]], model: IPSModel
) -> None:
    """Two feeds at a time, as two ranks have them, over other parts of the cohort and another epoch after it."""
    streamed, stored = kinds
    feeds = [Feed(streamed, cpus=0.5, readers=2) for _ in range(2)]
    for epoch, hands in enumerate([([3, 0, 2], [4, 1]), ([1, 2], [0, 4, 3])]):
        for feed, hand in zip(feeds, hands, strict=True):
            feed.announce(hand)
        for turn in range(3):
            for feed, hand in zip(feeds, hands, strict=True):
                if turn < len(hand):
                    index = hand[turn]
                    augment = Augment(1, epoch, streamed[index].key)
                    bag = feed.bag(index, threads=1, augment=augment)
                    twin = PatchBag([stored[index]], threads=1, augment=augment)
                    for one, other in zip(bag.chunks(5), twin.chunks(5), strict=True):
                        assert torch.equal(one.index, other.index)
                        assert torch.equal(arrived(one, CPU), arrived(other, CPU))
    feeds[0].announce([2, 2])
    bags: list[Bag] = [feeds[0].bag(2, threads=1, augment=None), PatchBag([stored[2]], threads=1, augment=None)]
    found = [select(model, [bag], 5, 7) for bag in bags]
    assert torch.equal(found[0].index, found[1].index)
    assert torch.equal(found[0].scores, found[1].scores)
    rows = found[0].index[0]
    assert torch.equal(*(arrived(bag.take(rows), CPU) for bag in bags))
    feeds[0].close()
    feeds[1].close()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session", "small_tasks")
def test_blocks_hold_one_slide_each_and_rows_come_in_order(
    kinds: tuple[list[StreamedSlide], list[StoredSlide]],
) -> None:
    streamed, stored = kinds
    order = [4, 0, 4]
    blocks = list(streaming._stream([streamed[index] for index in order], cpus=0.5, readers=3))
    assert len(blocks) > len(order)
    assert [block.place for block in blocks] == sorted(block.place for block in blocks)
    for place, index in enumerate(order):
        mine = [block for block in blocks if block.place == place]
        assert [row for b in mine for row in range(b.first, b.first + len(b.images))] == list(
            range(stored[index].n_patches)
        )
        assert [image for b in mine for image in b.images] == stored[index].payloads(np.arange(stored[index].n_patches))


def test_out_of_turn_patches_are_cut_here(kinds: tuple[list[StreamedSlide], list[StoredSlide]]) -> None:
    """Before anything is announced, and for slides that are not next; no Ray is asked."""
    streamed, stored = kinds
    feed = Feed(streamed, cpus=1, readers=1)
    feed.announce([3])
    found = torch.cat([chunk.patches for chunk in feed.bag(1, threads=1, augment=None).chunks(5)])
    wanted = torch.cat([chunk.patches for chunk in PatchBag([stored[1]], threads=1, augment=None).chunks(5)])
    assert torch.equal(found, wanted)
    assert len(feed.bag(3, threads=1, augment=None)) == stored[3].n_patches


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_slide_that_fails_on_the_way_says_why(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, ["no", "yes"])
    streamed = stream_slides(cohort, tmp_path / "store", small_config().tiling)
    write_slide(Path(streamed[1].uri), seed=99)
    feed = Feed(streamed, cpus=0.5, readers=1)
    feed.announce([0, 1])
    assert sum(len(chunk.index) for chunk in feed.bag(0, threads=1, augment=None).chunks(9)) == streamed[0].n_patches
    with pytest.raises(SlideError, match=r"s1.png: the file was replaced") as caught:
        list(feed.bag(1, threads=1, augment=None).chunks(9))
    assert caught.value.reason == "changed"


def test_another_slide_s_blocks_are_not_taken(kinds: tuple[list[StreamedSlide], list[StoredSlide]]) -> None:
    slide = kinds[0][0]
    n = slide.n_patches
    good = streaming._Block(0, 0, [b"x"] * 4)
    for bad in (streaming._Block(1, 4, [b"x"]), streaming._Block(0, 5, [b"x"]), streaming._Block(0, 0, [b"x"])):
        with pytest.raises(StageError, match=r"came in its stream instead of row 4 of slide 0"):
            list(streaming._rows(iter([good, bad]), 0, slide))
    with pytest.raises(StageError, match=f"ends after 4 of {n} patches"):
        list(streaming._rows(iter([good]), 0, slide))
