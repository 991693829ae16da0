from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ips.bag import TensorBag, collate
from ips.learning.losses import mean_loss, task_loss
from ips.network.heads import Kind

_NAN = math.nan


def _one(kind: Kind, logits: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    found = task_loss({"t": logits}, {"t": target}, {"t": kind}, None if weights is None else {"t": weights})["t"]
    return float(found.total), float(found.weight)


def test_binary() -> None:
    logits = torch.tensor([[0.3], [-2.0], [1.5], [9.0]])
    total, weight = _one("binary", logits, torch.tensor([1.0, 0.0, _NAN, -1.0]))
    assert total == pytest.approx(-math.log(1 / (1 + math.exp(-0.3))) - math.log(1 - 1 / (1 + math.exp(2.0))))
    assert weight == 2
    total, weight = _one("binary", logits, torch.tensor([1, 0, -1, -1]), torch.tensor([3.0, 0.5]))
    assert total == pytest.approx(-0.5 * math.log(1 / (1 + math.exp(-0.3))) - 3 * math.log(1 - 1 / (1 + math.exp(2.0))))
    assert weight == 3.5


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_multiclass_is_torchs(weights: Tensor | None) -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 2, -1, 1, 1, -1])
    total, weight = _one("multiclass", logits, target, weights)
    expected = F.cross_entropy(logits, target, weights, ignore_index=-1)
    assert total / weight == pytest.approx(float(expected), rel=1e-5)
    floats = torch.where(target < 0, _NAN, target.float())
    assert _one("multiclass", logits, floats, weights) == pytest.approx((total, weight))


def test_multilabel_and_regression_count_known_entries() -> None:
    logits = torch.randn(3, 2)
    labels = torch.tensor([[1.0, _NAN], [0.0, 1.0], [-1.0, 0.0]])
    total, weight = _one("multilabel", logits, labels)
    known = [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert weight == 4
    assert total == pytest.approx(
        sum(float(F.binary_cross_entropy_with_logits(logits[i, j], labels[i, j])) for i, j in known), rel=1e-5
    )
    total, weight = _one("regression", logits[:, :1], torch.tensor([-1.0, _NAN, 2.0]))
    assert weight == 2
    assert total == pytest.approx(float((logits[0, 0] + 1) ** 2 + (logits[2, 0] - 2) ** 2), rel=1e-5)


def test_survival_is_the_likelihood_of_the_hazards() -> None:
    logits = torch.randn(4, 3)
    h = logits.sigmoid().double()
    target = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0], [_NAN, 1.0]])
    likelihood = [(1 - h[0, 0]) * h[0, 1], (1 - h[1, 0]) * (1 - h[1, 1]) * (1 - h[1, 2]), h[2, 0]]
    total, weight = _one("survival", logits, target)
    assert weight == 3
    assert total == pytest.approx(-sum(math.log(float(value)) for value in likelihood), rel=1e-5)


def test_a_missing_label_has_no_gradient_and_no_nan() -> None:
    kinds: dict[str, Kind] = {"b": "binary", "m": "multiclass", "l": "multilabel", "r": "regression", "s": "survival"}
    outputs = {task: torch.randn(2, 1 if task == "b" else 3, requires_grad=True) for task in kinds}
    targets = {
        "b": torch.tensor([_NAN, 1.0]),
        "m": torch.tensor([-1, 2]),
        "l": torch.tensor([[_NAN] * 3, [1.0, 0.0, 1.0]]),
        "r": torch.tensor([[_NAN] * 3, [1.0, 0.0, 1.0]]),
        "s": torch.tensor([[_NAN, _NAN], [1.0, 1.0]]),
    }
    mean_loss(task_loss(outputs, targets, kinds)).backward()  # type: ignore[no-untyped-call]
    for logits in outputs.values():
        assert logits.grad is not None
        assert logits.grad[0].eq(0).all()
        assert logits.grad[1].abs().sum() > 0


def test_mean_over_tasks_where_one_has_no_label() -> None:
    outputs = {"a": torch.zeros(2, 1, requires_grad=True), "b": torch.zeros(2, 1, requires_grad=True)}
    targets = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([_NAN, _NAN])}
    loss = mean_loss(task_loss(outputs, targets, {"a": "binary", "b": "binary"}))
    assert float(loss.detach()) == pytest.approx(math.log(2) / 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs["b"].grad is not None
    assert outputs["b"].grad.eq(0).all()


def test_bfloat16_logits_are_scored_in_float32() -> None:
    """In bfloat16 log 3 would be 1.1016."""
    total = task_loss({"t": torch.zeros(2, 3).bfloat16()}, {"t": torch.tensor([0, 2])}, {"t": "multiclass"})["t"].total
    assert float(total) == pytest.approx(2 * math.log(3), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("binary", torch.tensor([1.0, 2.0]), r"targets\['t'\] holds labels outside 0..1"),
        ("binary", torch.tensor([0.5, 1.0]), r"outside 0..1"),
        ("binary", torch.zeros(2, 2), r"targets\['t'\] has shape \(2, 2\); needs \(2,\), a class an image"),
        ("multiclass", torch.zeros(2, 3), r"targets\['t'\] has shape \(2, 3\); needs \(2,\)"),
        ("regression", torch.tensor([[0, 1, math.inf]] * 2), r"targets\['t'\] holds infinity"),
        ("multiclass", torch.tensor([0, 3]), r"outside 0..2"),
        ("multiclass", torch.tensor([0]), r"has 1 images, the logits have 2"),
        ("multilabel", torch.tensor([[1.0], [0.0]]), r"shape \(2, 1\), the logits \(2, 3\)"),
        ("survival", torch.tensor([1.0, 1.0]), r"survival needs \(2, 2\)"),
        ("survival", torch.tensor([[3.0, 1.0], [0.0, 0.0]]), r"outside 0..2"),
        ("multiclass", torch.tensor([1.5, 0.0]), r"outside 0..2"),
        ("multiclass", torch.tensor([2.0, -0.5]), r"outside 0..2"),
        ("survival", torch.tensor([[0.7, 1.0], [0.0, 0.0]]), r"outside 0..2"),
        ("survival", torch.tensor([[1.0, 0.5], [0.0, 0.0]]), r"outside 0..1"),
        ("multiclass", torch.tensor(1.0), r"outputs\['t'\] has shape \(2, 3\), targets\['t'\] \(\); needs"),
        ("foo", torch.zeros(2), r"kinds\['t'\]='foo' is not a kind of task; use one of \['binary', 'multiclass'"),
    ],
)
def test_bad_targets_are_named(kind: Kind, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _one(kind, torch.zeros(2, 1 if kind == "binary" else 3), target)


def test_class_weights_only_where_they_mean_something() -> None:
    with pytest.raises(ValueError, match=r"class_weights\['t'\]: only"):
        _one("regression", torch.zeros(2, 1), torch.zeros(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"class_weights\['t'\] has shape \(3,\); needs \(2,\)"):
        _one("binary", torch.zeros(2, 1), torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"class_weights\['t'\] has shape \(2,\); needs \(3,\)"):
        _one("multiclass", torch.zeros(2, 3), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"class_weights names \['u'\]; the tasks are \['t'\]"):
        task_loss({"t": torch.zeros(2, 1)}, {"t": torch.zeros(2)}, {"t": "binary"}, {"u": torch.ones(2)})


@pytest.mark.parametrize("weights", [[1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, 1.0, math.inf]])
def test_class_weights_are_finite_and_not_negative(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"class_weights\['t'\] is \[1.0, .*; weights must be finite and >= 0"):
        _one("multiclass", torch.zeros(2, 3), torch.zeros(2), torch.tensor(weights))
    assert _one("multiclass", torch.zeros(2, 3), torch.zeros(2), torch.tensor([0.0, 1.0, 1.0])) == (0, 0)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression", "survival"])
def test_logits_have_two_axes(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"outputs\['t'\] has shape \(2,\), .*; needs logits \(B, K\)"):
        _one(kind, torch.zeros(2), torch.zeros(2))


def test_no_loss_has_no_mean() -> None:
    with pytest.raises(ValueError, match="losses holds no task"):
        mean_loss({})


def test_whole_labels_may_be_of_any_type() -> None:
    logits = torch.randn(2, 3)
    expected = _one("multiclass", logits, torch.tensor([1, 0]))
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64):
        assert _one("multiclass", logits, torch.tensor([1, 0]).to(dtype)) == expected


def test_absent_tasks_and_wide_binary_logits_are_named() -> None:
    logits, target = torch.zeros(2, 2), torch.zeros(2)
    with pytest.raises(ValueError, match=r"outputs\['t'\] has shape \(2, 2\); a binary task needs \(2, 1\)"):
        _one("binary", logits, target)
    with pytest.raises(ValueError, match=r"outputs has no task 't', only \['u'\]"):
        task_loss({"u": logits}, {"t": target}, {"t": "multiclass"})
    with pytest.raises(ValueError, match=r"targets has no task 't', only \[\]"):
        task_loss({"t": logits}, {}, {"t": "multiclass"})


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("binary", [1.0, 0.0]),
        ("multiclass", [2.0, 0.0]),
        ("multilabel", [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        ("regression", [[0.3, 0.1, -2.0], [0.2, 0.7, 9.0]]),
        ("survival", [[2.0, 1.0], [0.0, 0.0]]),
    ],
)
def test_losses_have_the_precision_of_the_logits(kind: Kind, target: list[float]) -> None:
    single = torch.randn(2, 1 if kind == "binary" else 3, generator=torch.Generator().manual_seed(0))
    losses = [
        task_loss({"t": logits}, {"t": torch.tensor(target)}, {"t": kind})
        for logits in (single, single.double(), single.bfloat16())
    ]
    assert [mean_loss(loss).dtype for loss in losses] == [torch.float32, torch.float64, torch.float32]
    assert all(loss["t"].total.dtype == loss["t"].weight.dtype for loss in losses)
    torch.testing.assert_close(losses[0]["t"].total.double(), losses[1]["t"].total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "shape"), [("multilabel", (3,)), ("regression", (2,)), ("survival", (2,))])
def test_a_batch_without_any_label_adds_nothing_whatever_the_shape_of_one(kind: Kind, shape: tuple[int, ...]) -> None:
    logits = torch.rand(2, *shape, requires_grad=True)
    bag = TensorBag(torch.rand(3, 5))
    _, targets = collate([(bag, {"t": None})] * 2)
    (loss,) = task_loss({"t": logits}, targets, {"t": kind}).values()
    assert (loss.total.item(), loss.weight.item()) == (0, 0)
    with pytest.raises(ValueError, match=r"targets\['t'\] has shape \(2,\)"):
        task_loss({"t": logits}, {"t": torch.tensor([math.nan, 1.0])}, {"t": kind})
