from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ips.bag import Bag, Chunk, TensorBag
from ips.learning.gradient import bounded_backward
from ips.selection.select import gather, select
from ips.selection.transfer import arrived, to_device
from tests.ips.nets import bag_of, tiny_model


@pytest.mark.parametrize("side_stream", [True, False])
def test_on_a_cpu_nothing_is_copied(side_stream: bool) -> None:  # noqa: FBT001
    patches = torch.rand(3, 1, 5, 7)
    assert to_device(patches, torch.device("cpu"), side_stream=side_stream) is patches


def test_patches_are_prepared_on_the_device() -> None:
    seen: list[torch.device] = []

    def prepare(patches: Tensor) -> Tensor:
        seen.append(patches.device)
        return patches + 1

    chunk = Chunk(torch.zeros(3, 1, 5, 7), torch.arange(3), prepare=prepare)
    assert arrived(chunk, torch.device("meta")).device.type == "meta"
    assert [device.type for device in seen] == ["meta"]
    assert torch.equal(arrived(chunk, torch.device("cpu")), torch.ones(3, 1, 5, 7))


@pytest.mark.parametrize("change", [lambda x: x[:2], lambda x: x.double()])
def test_preparing_keeps_shape_and_dtype(change: object) -> None:
    chunk = Chunk(torch.zeros(3, 1, 5, 7), torch.arange(3), prepare=change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prepare made .* of patches \(3, 1, 5, 7\) torch.float32"):
        arrived(chunk, torch.device("cpu"))


class _Mirrored(TensorBag):
    """Its patches are mirrored on the device."""

    def chunks(self, size: int) -> Iterator[Chunk]:
        return (replace(chunk, prepare=_mirror) for chunk in super().chunks(size))

    def take(self, rows: Tensor) -> Chunk:
        return replace(super().take(rows), prepare=_mirror)


def _mirror(patches: Tensor) -> Tensor:
    return patches.flip(-1)


def _sum(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([logits.flatten() for logits in outputs.values()]).sum()


def _pass(bags: list[Bag]) -> list[Tensor]:
    """Winners, their pixels, the logits and the gradients."""
    model = tiny_model().eval()
    selection = select(model, bags, 5, 7)
    _, outputs = bounded_backward(model, bags, selection, _sum, 3)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [selection.index, gather(bags, selection, "cpu").patches, *outputs.values(), *gradients]


def test_preparing_in_place_leaves_the_bag_alone() -> None:
    bag = bag_of(5)
    before = bag.patches.clone()
    found = arrived(replace(next(bag.chunks(5)), prepare=lambda x: x.bitwise_not_()), torch.device("cpu"))
    assert torch.equal(found, 255 - before)
    assert torch.equal(bag.patches, before)


def test_all_passes_see_prepared_patches() -> None:
    plain = [bag_of(23, seed=1).patches, bag_of(17, seed=2).patches]
    found = _pass([_Mirrored(patches) for patches in plain])
    expected = _pass([TensorBag(_mirror(patches)) for patches in plain])
    unprepared = _pass([TensorBag(patches) for patches in plain])
    assert all(torch.equal(one, same) for one, same in zip(found, expected, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(found[:3], unprepared[:3], strict=True))
