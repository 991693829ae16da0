from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ips.bag import Chunk, TensorBag
from ips.network.encoder import FeatureProjector
from ips.selection.baselines import every_patch
from ips.selection.intake import checked
from ips.selection.select import gather, select
from tests.ips.nets import bag_of, model_of, tiny_model


def _bag(patches: Tensor, positions: Tensor | None = None) -> TensorBag:
    return TensorBag(patches, positions)


class _Repeats(TensorBag):
    def chunks(self, size: int) -> Iterator[Chunk]:
        for chunk in super().chunks(size):
            yield Chunk(chunk.patches, torch.zeros_like(chunk.index))


class _Outside(TensorBag):
    def chunks(self, size: int) -> Iterator[Chunk]:
        for chunk in super().chunks(size):
            yield Chunk(chunk.patches, chunk.index + 3)


_PATCHES = bag_of(5).patches
_PLACES = torch.ones(5, 2)


@pytest.mark.parametrize(
    ("bag", "message"),
    [
        (_bag(_PATCHES[:0]), r"bags\[0\] is empty"),
        (_bag(_PATCHES[0]), r"patches has shape \(3, 13, 17\).*needs \(n, C, h, w\)"),
        (_bag(_PATCHES.long()), r"dtype torch.int64; needs"),
        (_bag(_PATCHES[:, 0, 0]), r"features must be float"),
        (_bag(_PATCHES[:, 0, 0] / 255), r"the encoder needs pixels, \(n, 3, h, w\)"),
        (_bag(_PATCHES[:, :1]), r"the encoder needs 3 channels"),
        (_bag(_PATCHES / 255 * torch.tensor([1.0, 1, 1, torch.nan, 1]).view(5, 1, 1, 1)), r"row 3 holds NaN"),
        (_bag(_PATCHES / torch.tensor([1.0, 0, 1, 1, 1]).view(5, 1, 1, 1)), r"row 1 holds NaN or infinity"),
        (_bag(_PATCHES), r"positions: the model encodes grid positions"),
        (_bag(_PATCHES, -_PLACES), r"positions reach from -1 to -1"),
        (_bag(_PATCHES, _PLACES * torch.nan), r"must be finite"),
        (_bag(_PATCHES, _PLACES * 1e4), r"< 10000"),
        (_Repeats(_PATCHES, _PLACES), r"gave 1 different rows of 5|positions"),
        (_Outside(_PATCHES, _PLACES), r"index reaches from 3 to 7; rows are 0..4"),
    ],
)
def test_bad_bags_are_named(bag: TensorBag, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(tiny_model(grid=True), [bag], 2, 5)


def test_one_image_is_still_a_list() -> None:
    with pytest.raises(ValueError, match=r"bags is a TensorBag, not a sequence; pass \[bag\]"):
        select(tiny_model(), bag_of(5), 2, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [True, False])
def test_chunks_may_be_empty(grid: bool) -> None:  # noqa: FBT001
    class Gaps(TensorBag):
        def chunks(self, size: int) -> Iterator[Chunk]:
            for chunk in super().chunks(size):
                yield self.take(chunk.index[:0])
                yield chunk

    whole = bag_of(19, grid=grid)
    found, expected = (
        select(tiny_model(grid=grid), [bag], 3, 4) for bag in (Gaps(whole.patches, whole.positions), whole)
    )
    assert torch.equal(found.index, expected.index)


def test_features_have_the_projectors_width() -> None:
    model = model_of(FeatureProjector(9, 12), 12)
    for patches in (torch.rand(4, 8), torch.rand(4, 3, 5, 5)):
        with pytest.raises(ValueError, match=r"patches has shape \(4, .*the encoder needs features \(n, 9\)"):
            select(model, [TensorBag(patches)], 2, 5)


def test_one_call_takes_one_dtype() -> None:
    """Side by side in one encoder batch, uint8 would be taken for floats of 0 to 255."""
    with pytest.raises(ValueError, match=r"bags\[1\]: .*torch.float32; .* \(3, 13, 17\) and torch.uint8"):
        select(tiny_model(), [bag_of(3), TensorBag(bag_of(3).patches / 255)], 2, 3)


def test_patches_have_pixels() -> None:
    with pytest.raises(ValueError, match="every size but n must be at least 1"):
        select(tiny_model(), [TensorBag(torch.rand(4, 3, 0, 5))], 2, 5)


def test_huge_but_finite_pixels_pass() -> None:
    """Their sum is infinite, they are not."""
    chunk = Chunk(torch.full((5, 3, 4, 4), 3e38), torch.arange(5))
    with pytest.warns(UserWarning, match="float pixels above 1.5"):
        assert list(checked(tiny_model(), [(0, chunk)], [5])) == [(0, chunk)]


@pytest.mark.parametrize("brightest", [1.0, 1.4])
def test_float_pixels_may_go_a_little_beyond_one(brightest: float) -> None:
    select(tiny_model(), [TensorBag(bag_of(9).patches / 255 * brightest)], 3, 4)


def test_float_pixels_that_count_to_255_are_told_of_once() -> None:
    bag = TensorBag(bag_of(9).patches.float())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            gather([bag], select(tiny_model(), [bag], 3, 4), "cpu")
    (warning,) = caught
    assert "divide those of 0..255 by 255" in str(warning.message)
    features = TensorBag(torch.rand(9, 5) * 255)
    assert len(gather([features], every_patch([features]), "cpu").patches[0]) == 9  # they have no range


def test_one_call_takes_one_patch_shape() -> None:
    with pytest.raises(ValueError, match=r"bags\[1\].*the patches before it have \(3, 13, 17\)"):
        select(tiny_model(), [bag_of(3), bag_of(3, h=11)], 2, 3)


@pytest.mark.parametrize("mode", ["exact", "window"])
def test_diverged_weights_are_named(mode: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.encoder.get_parameter("linear.weight").fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the logits of row 0 are NaN or infinite"):
        select(model, [bag_of(3)], 2, 5, mode)  # type: ignore[arg-type]
