from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from ips.bag import Batch, TensorBag, collate
from tests.ips.nets import bag_of


def test_chunks_give_every_row_once_in_order() -> None:
    bag = bag_of(23, grid=True)
    chunks = list(bag.chunks(7))
    assert [len(chunk.index) for chunk in chunks] == [7, 7, 7, 2]
    assert torch.equal(torch.cat([chunk.index for chunk in chunks]), torch.arange(23))
    assert torch.equal(torch.cat([chunk.patches for chunk in chunks]), bag.patches)
    assert chunks[1].patches.data_ptr() == bag.patches[7:].data_ptr()  # views: reading a bag copies nothing
    assert bag.positions is not None
    assert torch.equal(torch.cat([c.positions for c in chunks if c.positions is not None]), bag.positions)


def test_take_keeps_the_asked_order() -> None:
    bag = bag_of(23, grid=True)
    rows = torch.tensor([5, 22, 0, 5])
    chunk = bag.take(rows)
    assert torch.equal(chunk.index, rows)
    assert torch.equal(chunk.patches, bag.patches[rows])
    assert bag.positions is not None
    assert chunk.positions is not None
    assert torch.equal(chunk.positions, bag.positions[rows])
    assert TensorBag(bag.patches).take(rows).positions is None


def test_positions_must_fit() -> None:
    with pytest.raises(ValueError, match=r"positions has shape \(4, 2\); 5 patches need \(5, 2\)"):
        TensorBag(torch.zeros(5, 3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3), None, (2, 4), (2, 4)), r"patches has shape \(2, 5, 3\); with mask \(2, 4\) it needs \(2, 4, 3\)"),
        (((2, 4, 3), None, (2, 5), (2, 4)), r"index has shape \(2, 5\); .* needs \(2, 4\)"),
        (((2, 4, 3), (2, 4, 3), (2, 4), (2, 4)), r"positions has shape \(2, 4, 3\); .* needs \(2, 4, 2\)"),
    ],
)
def test_a_batch_is_of_one_size(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    patches, positions, index, mask = (None if shape is None else torch.ones(shape) for shape in shapes)
    assert patches is not None
    assert index is not None
    assert mask is not None
    with pytest.raises(ValueError, match=message):
        Batch(patches, positions, index, mask)


def _batch() -> Batch:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    return Batch(torch.rand(2, 3, 4), torch.rand(2, 3, 2), torch.arange(6).view(2, 3), mask)


def test_a_batch_knows_where_its_patches_are() -> None:
    assert _batch().real.tolist() == [0, 1, 3]


def test_a_batch_moves_whole() -> None:
    moved = _batch().to("meta")
    found = {name: x.device.type for name, x in vars(moved).items() if x is not None}
    assert found == dict.fromkeys(("patches", "positions", "index", "mask", "real"), "meta")
    without = _batch()
    assert Batch(without.patches, None, without.index, without.mask).to("cpu").positions is None


def test_a_batch_is_mapped_over() -> None:
    batch = _batch()
    leaves, spec = pytree.tree_flatten({"x": batch})
    assert len(leaves) == 5
    (again,) = pytree.tree_unflatten(leaves, spec).values()
    parts = [part for part in vars(again).values() if part is not None]
    assert all(again_part is part for again_part, part in zip(parts, leaves, strict=True))
    assert isinstance(pytree.tree_map(type, batch), Batch)


def test_labels_are_collated_by_task() -> None:
    items = [
        (bag_of(5), {"er": 1, "survival": (3, 0), "age": 61.5}),
        (bag_of(3), {"er": None, "survival": torch.tensor([2.0, 1.0])}),
    ]
    loader: Any = torch.utils.data.DataLoader(items, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    ((bags, targets),) = loader
    assert [len(bag) for bag in bags] == [5, 3]
    assert targets["er"].isnan().tolist() == [False, True]
    assert targets["survival"].tolist() == [[3, 0], [2, 1]]
    assert targets["age"][0] == 61.5
    assert targets["age"].isnan().tolist() == [False, True]
    for labels in ([1, (1, 2)], ["yes", "no"]):
        with pytest.raises(ValueError, match="labels of task 'er' cannot be stacked"):
            collate([(bag_of(2), {"er": label}) for label in labels])
