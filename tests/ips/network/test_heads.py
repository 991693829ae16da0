from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from ips.network.heads import Head, Heads, Kind, linear_head, probabilities


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


def _heads(kinds: dict[str, Kind], seed: int = 0) -> Heads:
    torch.manual_seed(seed)
    return Heads({task: linear_head(kind, 7, 2) for task, kind in kinds.items()})


def _numbered(heads: Heads) -> dict[str, Tensor]:
    """The state dict that a list of the same heads has."""
    return nn.ModuleList(head for _, head in heads.items()).state_dict()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"pr": "binary", "er": "binary"},
            r"is of the heads \['0:er:binary', '1:pr:binary'\], .* \['0:pr:binary', '1:er",
        ),
        ({"er": "binary", "her2": "binary"}, "the same tasks, in the same order"),
        ({"er": "binary"}, "the same tasks, in the same order"),
    ],
)
def test_weights_of_other_tasks_or_another_order_do_not_load(other: dict[str, Kind], message: str) -> None:
    state = _heads({"er": "binary", "pr": "binary"}).state_dict()
    with pytest.raises(RuntimeError, match=message):
        _heads(other).load_state_dict(state)


def test_weights_of_another_meaning_do_not_load() -> None:
    state = _heads({"grade": "multiclass"}).state_dict()
    with pytest.raises(RuntimeError, match="is of the heads"):
        _heads({"grade": "multilabel"}).load_state_dict(state)
    with pytest.raises(RuntimeError, match="is of the heads"):
        Heads({"grade": nn.Linear(7, 2)}).load_state_dict(state)


def test_numbered_heads_are_refused_and_named_where_their_order_is_known() -> None:
    """Tasks whose names are the numbers of others, too."""
    kinds: dict[str, Kind] = {"1": "binary", "0": "multiclass"}
    saved, heads = _heads(kinds), _heads(kinds, seed=1)
    with pytest.raises(RuntimeError, match=r"numbers and no names.*\['1', '0'\] in this order, load model.named"):
        heads.load_state_dict(_numbered(saved))
    heads.load_state_dict(heads.named(_numbered(saved), prefix=""))
    x = torch.rand(3, 2, 7)
    assert all(torch.equal(logits, saved(x)[task]) for task, logits in heads(x).items())


def test_what_is_no_head_keeps_its_name() -> None:
    heads = _heads({"er": "binary"})
    state = {"heads.0.weight": torch.ones(1), "heads.1.weight": torch.ones(1), "encoder.heads.0.weight": torch.ones(1)}
    assert list(heads.named(state)) == ["heads.0:er:binary.weight", "heads.1.weight", "encoder.heads.0.weight"]
    assert heads.named(heads.named(state)).keys() == heads.named(state).keys()


NAMES = ["er.status", "er%2Estatus", "a:binary", "keys", "type", "0", "training", "ki-67 é"]


def test_any_name_will_do() -> None:
    saved, heads = (_heads(dict.fromkeys(NAMES, "binary"), seed) for seed in (0, 1))
    assert len({re.sub(r"^\d+:", "", name) for name in saved.state_dict()}) == 2 * len(NAMES)
    heads.load_state_dict(saved.state_dict())
    assert heads.tasks == tuple(NAMES) == tuple(heads.kinds)
    assert torch.equal(heads["er.status"].get_parameter("weight"), saved["er.status"].get_parameter("weight"))
    for name in ("", 3):
        with pytest.raises(ValueError, match=f"heads: {name!r} is not a name of a task"):
            Heads({name: nn.Linear(7, 1)})  # type: ignore[dict-item]


def test_a_head_of_ones_own_says_its_kind() -> None:
    class Deep(Head):
        kind = "survival"

    class Cooker(nn.Linear):
        kind = "gas"

    assert Heads({"a": Deep(), "b": Cooker(7, 1)}).kinds == {"a": "survival"}
