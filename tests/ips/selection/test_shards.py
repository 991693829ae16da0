from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ips.bag import Chunk, TensorBag
from ips.selection.select import select
from ips.selection.shards import Strips
from tests.gloo import one_of_two
from tests.ips.nets import bag_of, resnet_model, tiny_model

_KINDS = (torch.float32, torch.float64)


def _bags() -> list[TensorBag]:
    return [bag_of(n, n, h=37, w=29, grid=True) for n in (67, 1, 20)]


class _Lost(TensorBag):
    """Can be read once, not twice."""

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        for low in range(start, stop, size):
            yield super().take(torch.arange(low, min(low + size, stop)))

    def take(self, rows: Tensor) -> Chunk:
        raise OSError("the disk is gone")


@contextmanager
def _one_of_two(rank: int, folder: str) -> Iterator[None]:
    """In a process group of two; an error is left in a file named after the rank."""
    with one_of_two(rank, folder):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            Path(f"{folder}/{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def _certifier(rank: int, folder: str) -> None:
    bag = (_Lost if rank == 1 else TensorBag)(bag_of(40).patches)
    with _one_of_two(rank, folder):
        select(tiny_model(), [bag], 5, 8, dtype=torch.bfloat16, certify=True, group=dist.group.WORLD)


@pytest.mark.slow
def test_a_failure_of_the_second_scoring_ends_both(tmp_path: Path) -> None:
    spawn(_certifier, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    assert "RuntimeError: the selection failed on another process" in (tmp_path / "0.txt").read_text()
    assert "OSError: the disk is gone" in (tmp_path / "1.txt").read_text()


class _Parts(TensorBag):
    """Its strips are cut where its files end, every 5 rows."""

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        while start < stop:
            end = min(start + size, stop, start - start % 5 + 5)
            yield self.take(torch.arange(start, end))
            start = end


def test_strips_may_come_in_shorter_chunks(group_of_one: dist.ProcessGroup) -> None:
    whole = bag_of(23)
    found, expected = (select(tiny_model(), [bag], 3, 8, group=group_of_one) for bag in (_Parts(whole.patches), whole))
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.scores, expected.scores)


def test_a_strip_of_too_much_is_refused(group_of_one: dist.ProcessGroup) -> None:
    class Long(_Parts):
        def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
            return super().strip(size + 1, start, stop)

    with pytest.raises(ValueError, match=r"bags\[0\].strip gave 5 patches for 4 rows"):
        select(tiny_model(), [Long(bag_of(23).patches)], 3, 4, group=group_of_one)


def _uneven(rank: int, folder: str, what: str) -> None:
    bags = [bag_of(9, 1), bag_of(5 + (rank if what == "length" else 0), 2)]
    model = tiny_model(heads=3 + (rank if what == "model" else 0))
    if what == "count":
        bags = bags[: 1 + rank]
    if what == "empty" and rank == 1:
        bags = []
    with _one_of_two(rank, folder):
        select(model, bags, 3, 4, group=dist.group.WORLD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("length", ["ValueError: group: its processes have 5 to 6 patches in bags[1]"] * 2),
        ("count", ["ValueError: group: its processes have 1 to 2 bags; all must pass the same bags"] * 2),
        ("model", ["ValueError: group: its processes have 6 to 8 logits a patch"] * 2),
        ("empty", ["RuntimeError: the selection failed on another process", "ValueError: bags holds no image"]),
    ],
)
def test_processes_with_different_bags_all_say_so(tmp_path: Path, what: str, messages: list[str]) -> None:
    spawn(_uneven, args=(str(tmp_path), what), nprocs=2)  # type: ignore[no-untyped-call]
    for rank, message in enumerate(messages):
        assert message in (tmp_path / f"{rank}.txt").read_text()


def _worker(rank: int, folder: str, broken: int) -> None:
    bags = _bags()
    if rank == broken:
        patches = bags[0].patches / 255
        patches[-1] = torch.nan
        patches[0] = torch.nan
        bags[0] = TensorBag(patches, bags[0].positions)
    with _one_of_two(rank, folder):
        for kind in _KINDS:
            model, group = resnet_model(grid=True).to(kind), dist.group.WORLD
            found = select(model, bags, 9, 5, attention=True, group=group)
            heads = select(model, bags, 9, 5, group=group, rank="heads")
            torch.save((found.index, found.scores, found.attention, heads.index), f"{folder}/{kind}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    spawn(_worker, args=(str(tmp_path), -1), nprocs=2)  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = {kind: resnet_model(grid=True).to(kind) for kind in _KINDS}
    answers = {kind: select(model, _bags(), 9, 5, attention=True) for kind, model in models.items()}
    heads = {kind: select(model, _bags(), 9, 5, rank="heads") for kind, model in models.items()}
    torch.set_num_threads(threads)
    for kind, alone in answers.items():
        assert alone.attention is not None
        for rank in range(2):
            index, scores, attention, by_heads = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert torch.equal(by_heads, heads[kind].index)
            assert torch.equal(index, alone.index)
            assert torch.equal(scores, alone.scores)
            assert all(torch.equal(a, b) for a, b in zip(attention, alone.attention, strict=True))


@pytest.mark.slow
def test_a_failure_on_one_process_ends_both(tmp_path: Path) -> None:
    spawn(_worker, args=(str(tmp_path), 1), nprocs=2)  # type: ignore[no-untyped-call]
    assert "RuntimeError: the selection failed on another process" in (tmp_path / "0.txt").read_text()
    assert "ValueError: bags[0]" in (tmp_path / "1.txt").read_text()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_strips_cover_every_row_once(world: int) -> None:
    bags = [bag_of(n) for n in (1, 5, 23)]
    found: list[list[int]] = [[], [], []]
    for rank in range(world):
        share = Strips(dist.group.WORLD, rank, world)  # type: ignore[arg-type]
        for number, chunk in share.chunks(bags, 4):
            assert 0 < len(chunk.index) <= 4
            found[number] += chunk.index.tolist()
    assert found == [list(range(len(bag))) for bag in bags]


class _Slips(TensorBag):
    """Gives other rows than it is asked for."""

    def __init__(self, bag: TensorBag, slip: Callable[[Tensor], Tensor]) -> None:
        super().__init__(bag.patches, bag.positions)
        self._slip = slip

    def take(self, rows: Tensor) -> Chunk:
        return super().take(self._slip(rows))


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (lambda rows: rows[:-1], r"bags\[1\].take gave 3 patches for 4 rows"),
        (lambda rows: rows.flip(0), r"bags\[1\].take gave row 3 where row 0 was asked for"),
        (lambda rows: rows.clamp(max=2), r"bags\[1\].take gave row 2 where row 3 was asked for"),
        (lambda rows: rows.int(), r"bags\[1\]: index has shape \(4,\), torch.int32; needs \(4,\) int64"),
    ],
)
def test_a_strip_of_other_rows_is_refused(
    group_of_one: dist.ProcessGroup, slip: Callable[[Tensor], Tensor], message: str
) -> None:
    bags = [bag_of(5), _Slips(bag_of(9), slip)]
    with pytest.raises(ValueError, match=message):
        select(tiny_model(), bags, 3, 4, group=group_of_one)


def test_a_group_of_one_gives_the_answer_of_none(group_of_one: dist.ProcessGroup) -> None:
    shared, alone = (select(tiny_model(), [bag_of(9), bag_of(1)], 3, 4, group=group) for group in (group_of_one, None))
    assert torch.equal(shared.index, alone.index)
    assert torch.equal(shared.scores, alone.scores)


def test_the_window_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="need mode='exact'"):
        select(resnet_model(), [bag_of(3)], 2, 3, "window", group=object())  # type: ignore[arg-type]
