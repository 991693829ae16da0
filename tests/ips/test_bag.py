from __future__ import annotations

import pytest
import torch

from ips.bag import Batch, TensorBag
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
