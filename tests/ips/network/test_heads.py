from __future__ import annotations

import pytest
import torch

from ips.network.heads import Kind, linear_head, probabilities


@pytest.mark.parametrize(
    ("kind", "classes", "outputs"),
    [("binary", 2, 1), ("multiclass", 5, 5), ("multilabel", 4, 4), ("regression", 1, 1), ("survival", 6, 6)],
)
def test_heads_have_their_logits(kind: Kind, classes: int, outputs: int) -> None:
    assert linear_head(kind, 7, classes)(torch.zeros(3, 7)).shape == (3, outputs)


@pytest.mark.parametrize(("kind", "classes"), [("binary", 3), ("multiclass", 1), ("multilabel", 0)])
def test_numbers_of_classes_that_cannot_be(kind: Kind, classes: int) -> None:
    with pytest.raises(ValueError, match=f"classes={classes}"):
        linear_head(kind, 7, classes)


def test_probabilities() -> None:
    logits = torch.randn(5, 3)
    torch.testing.assert_close(probabilities("binary", logits[:, :1])[:, 1], logits[:, 0].sigmoid())
    torch.testing.assert_close(probabilities("binary", logits[:, :1]).sum(dim=1), torch.ones(5))
    torch.testing.assert_close(probabilities("multiclass", logits).sum(dim=1), torch.ones(5))
    assert probabilities("multiclass", logits).argmax(1).tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(probabilities("multilabel", logits), logits.sigmoid())
    assert probabilities("regression", logits) is logits
    survival = probabilities("survival", torch.tensor([[0.0, 0.0, 20.0]]))
    torch.testing.assert_close(survival, torch.tensor([[0.5, 0.25, 0.0]]))


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kind='foo' is not a kind of task; use one of .*'survival'"):
        linear_head("foo", 7, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind='foo'"):
        probabilities("foo", torch.zeros(2, 3))  # type: ignore[arg-type]
