from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ips.bag import Chunk, Selection, TensorBag
from ips.learning.gradient import Norm, bounded_backward
from ips.network.model import IPSModel
from ips.network.positions import IndexPositions
from ips.selection.baselines import every_patch
from ips.selection.select import gather, select
from tests.ips.nets import bag_of, resnet_model, tiny_model


def _loss(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([logits.square().mean() + logits.sum() for logits in outputs.values()]).sum()


def _without_dropout(model: IPSModel) -> IPSModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _norms(model: IPSModel) -> list[nn.Module]:
    return [m for m in model.encoder.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]


def _same(a: IPSModel, b: IPSModel) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, value), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_frozen_is_the_plain_step(kind: str, chunk: int) -> None:
    model = tiny_model(grid=True, scale=1.0) if kind == "tiny" else resnet_model(grid=True, scale=1.0)
    bounded = _without_dropout(model).train()
    plain = copy.deepcopy(bounded)
    bags = [bag_of(n, n, h=37, w=29, grid=True) for n in (23, 3, 11)]
    selection = select(model, bags, 6, 5)
    value, outputs = bounded_backward(bounded, bags, selection, _loss, chunk)
    for norm in _norms(plain):
        norm.eval()
    expected = plain(gather(bags, selection, "cpu"))
    _loss(expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(value, _loss(expected).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["task.1"], expected["task.1"].detach(), rtol=1e-4, atol=1e-4)
    _same(bounded, plain)
    assert all(norm.training for norm in _norms(bounded))


def _plain_by_chunks(model: IPSModel, bags: list[TensorBag], index: Tensor, mask: Tensor, sizes: list[int]) -> None:
    """The plain step, every chunk's graph kept: encode chunk after chunk, pool, one backward."""
    image, place = mask.nonzero(as_tuple=True)
    patches = torch.stack([bags[b].patches[index[b, m]] for b, m in zip(image.tolist(), place.tolist(), strict=True)])
    embeddings = torch.cat([model.embed(part) for part in patches.split(sizes)])  # type: ignore[no-untyped-call]
    _loss(model.pool(embeddings, mask, None)).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("chunk", "sizes"), [(4, [4, 4, 4, 3]), (7, [5, 5, 5]), (100, [15])])
def test_group_is_the_plain_step_over_the_same_chunks_dropout_included(chunk: int, sizes: list[int]) -> None:
    bounded = tiny_model(scale=1.0).train()
    plain = copy.deepcopy(bounded)
    bags = [bag_of(n, n) for n in (23, 3, 11)]
    selection = select(bounded, bags, 6, 5)
    torch.manual_seed(7)
    bounded_backward(bounded, bags, selection, _loss, chunk, "group")
    after = torch.rand(3)
    torch.manual_seed(7)
    _plain_by_chunks(plain, bags, selection.index, selection.mask, sizes)
    assert torch.equal(torch.rand(3), after)  # the stream of random numbers goes on as after the plain step
    _same(bounded, plain)
    count = bounded.encoder.get_buffer("bn.num_batches_tracked")
    assert int(count) == len(sizes)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.sampled_from(["frozen", "group"]))
def test_no_more_than_a_chunk_is_ever_alive(chunk: int, memory: int, norm: Norm) -> None:
    model = _without_dropout(tiny_model()).train()
    bags = [_Counting(bag_of(n, n).patches) for n in (23, 9, 11)]
    selection = select(model, bags, memory, 5)
    if norm == "group" and chunk == 1:
        chunk = 2  # statistics of one embedding do not exist
    _Counting.taken.clear()
    encoded: list[int] = []
    model.encoder.register_forward_hook(lambda _m, args, _out: encoded.append(len(args[0])))
    try:
        bounded_backward(model, bags, selection, _loss, chunk, norm)
    except ValueError as error:
        assert "it leaves one alone, which has no statistics" in str(error)  # noqa: PT017
        return
    total = int(selection.mask.sum())
    assert max(encoded) <= chunk
    assert max(_Counting.taken) <= chunk
    assert sum(encoded) == 2 * total
    assert max(encoded) - min(encoded) <= 1


class _Counting(TensorBag):
    taken: list[int] = []  # noqa: RUF012, one list for all bags is the point

    def take(self, rows: Tensor) -> Chunk:
        self.taken.append(len(rows))
        return super().take(rows)


def test_a_float64_model_gets_float64_gradients() -> None:
    bounded = _without_dropout(resnet_model(grid=True, scale=1.0)).double().train()
    plain = copy.deepcopy(bounded)
    bags = [bag_of(n, n, h=37, w=29, grid=True) for n in (23, 3, 11)]
    selection = select(bounded, bags, 6, 5)
    value, outputs = bounded_backward(bounded, bags, selection, _loss, 4)
    for norm in _norms(plain):
        norm.eval()
    expected = plain(gather(bags, selection, "cpu"))
    _loss(expected).backward()  # type: ignore[no-untyped-call]
    assert value.dtype == outputs["task.1"].dtype == torch.float64
    torch.testing.assert_close(value, _loss(expected).detach(), rtol=1e-12, atol=1e-12)
    for (name, p), (_, q) in zip(bounded.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_synchronised_norms_are_frozen_too() -> None:
    model = _without_dropout(tiny_model()).train()
    plain, bags = copy.deepcopy(model), [bag_of(9)]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    selection = select(model, bags, 4, 5)
    bounded_backward(model, bags, selection, _loss, 2)  # torch refuses to train such norms on a CPU
    bounded_backward(plain, bags, selection, _loss, 2)
    _same(model, plain)


def test_the_random_numbers_go_on_when_a_bag_raises_in_the_second_pass() -> None:
    model, bag = tiny_model().train(), bag_of(9)
    selection = select(model, [bag], 4, 5)
    torch.manual_seed(3)
    bounded_backward(model, [bag], selection, _loss, 2)
    after, torn = torch.rand(3), _Torn(bag.patches)
    torch.manual_seed(3)
    with pytest.raises(OSError, match="torn"):
        bounded_backward(model, [torn], selection, _loss, 2)
    assert torch.equal(torch.rand(3), after)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


class _Torn(TensorBag):
    taken = 0

    def take(self, rows: Tensor) -> Chunk:
        self.taken += 1
        if self.taken > 3:
            raise OSError("torn")
        return super().take(rows)


def test_gradients_add_up_over_calls() -> None:
    model = _without_dropout(tiny_model()).train()
    bags = [bag_of(9)]
    selection = select(model, bags, 4, 5)
    bounded_backward(model, bags, selection, _loss, 3)
    once = model.encoder.get_parameter("linear.weight").grad
    assert once is not None
    once = once.clone()
    bounded_backward(model, bags, selection, _loss, 3)
    torch.testing.assert_close(model.encoder.get_parameter("linear.weight").grad, 2 * once)


def test_a_frozen_encoder_gets_no_gradient_and_is_encoded_once() -> None:
    model = tiny_model().train()
    model.encoder.requires_grad_(False)
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
    bags = [bag_of(9)]
    selection = select(model, bags, 4, 5)
    calls.clear()
    bounded_backward(model, bags, selection, _loss, 2)
    assert calls == [2, 2]
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


def test_the_statistics_of_a_frozen_encoder_move_as_in_the_plain_step() -> None:
    """Frozen by `requires_grad` alone, and left in training mode."""
    bounded = _without_dropout(tiny_model(scale=1.0)).train()
    bounded.encoder.requires_grad_(False)
    plain = copy.deepcopy(bounded)
    bags = [bag_of(n, n) for n in (23, 3, 11)]
    selection = select(bounded, bags, 6, 5)
    bounded_backward(bounded, bags, selection, _loss, 4, "group")
    _plain_by_chunks(plain, bags, selection.index, selection.mask, [4, 4, 4, 3])
    assert int(bounded.encoder.get_buffer("bn.num_batches_tracked")) == 4
    for (name, value), (_, other) in zip(bounded.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_index_positions_are_replayed_too() -> None:
    model = _without_dropout(tiny_model()).train()
    model.position = IndexPositions(12)
    plain = copy.deepcopy(model)
    bags = [bag_of(9), bag_of(3)]
    selection = select(model, bags, 4, 5)
    bounded_backward(model, bags, selection, _loss, 2)
    for norm in _norms(plain):
        norm.eval()
    _loss(plain(gather(bags, selection, "cpu"))).backward()  # type: ignore[no-untyped-call]
    _same(model, plain)


def test_bfloat16_runs_under_autocast() -> None:
    model = _without_dropout(resnet_model(scale=1.0)).train()
    full = copy.deepcopy(model)
    bags = [bag_of(9, h=37, w=29)]
    selection = select(model, bags, 4, 5)
    half_value, _ = bounded_backward(model, bags, selection, _loss, 2, dtype=torch.bfloat16)
    value, _ = bounded_backward(full, bags, selection, _loss, 2)
    assert half_value != value
    torch.testing.assert_close(half_value.float(), value, rtol=0.05, atol=0.05)


def test_modes_return_when_the_selection_is_of_another_bag() -> None:
    model = tiny_model().train()
    bags = [bag_of(9)]
    selection = select(model, bags, 9, 5)
    with pytest.raises(
        ValueError, match=r"bags\[0\]: rows \d to 8 are asked for, but it has 0..7; is the selection of"
    ):
        bounded_backward(model, [bag_of(8)], selection, _loss, 2)
    assert all(m.training for m in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_images_without_patches_and_positions_out_of_range_are_named() -> None:
    model, bags = tiny_model(grid=True), [bag_of(9, grid=True), bag_of(3, grid=True)]
    selection = select(model, bags, 4, 5)
    for kept in ([1, 0], [0, 0]):
        mask = selection.mask & torch.tensor(kept, dtype=torch.bool)[:, None]
        with pytest.raises(ValueError, match=rf"selection: nothing of bags\[{kept[0]}\] is selected"):
            bounded_backward(model, bags, Selection(selection.index, mask, selection.scores), _loss, 2)
    far = TensorBag(bags[1].patches, torch.full((3, 2), 1e4))
    with pytest.raises(ValueError, match=r"positions reach from 0 to 10000; they must be finite, >= 0 and < 10000"):
        bounded_backward(model, [bags[0], far], selection, _loss, 2)


def test_bad_arguments_are_named() -> None:
    model, bags = tiny_model(), [bag_of(9)]
    selection = select(model, bags, 4, 5)
    with pytest.raises(ValueError, match="chunk=0"):
        bounded_backward(model, bags, selection, _loss, 0)
    with pytest.raises(ValueError, match="norm='batch'"):
        bounded_backward(model, bags, selection, _loss, 1, "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"chunk=2\.5 must be a whole number"):
        bounded_backward(model, bags, selection, _loss, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk=1: of 4 patches it leaves one alone, .* change chunk"):
        bounded_backward(model, bags, selection, _loss, 1, "group")
    with pytest.raises(ValueError, match="loss: it does not depend on the patches"):
        bounded_backward(model, bags, selection, lambda _: torch.tensor(3.0), 2)
    with pytest.raises(ValueError, match="loss: it does not depend on the patches"):
        bounded_backward(model, bags, selection, lambda _: model.heads["task.0"].get_parameter("weight").sum(), 2)
    model.encoder.bn = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        bounded_backward(model, bags, selection, _loss, 1)
    bounded_backward(model, bags, selection, _loss, 4, "group")
    two = [bag_of(9), TensorBag(bag_of(9).patches / 255)]
    with pytest.raises(ValueError, match=r"bags\[1\]: .*torch.float32; .*torch.uint8"):
        bounded_backward(model, two, every_patch(two), _loss, 20, "group")
    with pytest.raises(ValueError, match="bags has 2 images, the selection 1"):
        bounded_backward(model, bags * 2, selection, _loss, 1)


class _Restless(TensorBag):
    """Draws its augmentation anew each time, for one row."""

    def __init__(self, patches: Tensor, row: int) -> None:
        super().__init__(patches.clone())
        self._row = row

    def take(self, rows: Tensor) -> Chunk:
        self.patches[self._row, 0, 0, 0] += 1
        return super().take(rows)


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_a_bag_that_gives_another_patch_the_second_time_is_named(norm: Norm) -> None:
    model, bags = tiny_model().train(), [bag_of(4), _Restless(bag_of(9).patches, 6)]
    with pytest.raises(ValueError, match=r"bags\[1\].take gave another patch of row 6 the second time"):
        bounded_backward(model, bags, every_patch(bags), _loss, 4, norm)
    model.encoder.requires_grad_(False)
    bounded_backward(model, bags, every_patch(bags), _loss, 4, norm)  # taken once
