from __future__ import annotations

import copy
import math

import pytest
import torch

from ips.learning.schedule import parameter_groups, warmup_cosine, warmup_cosine_scheduler
from tests.ips.nets import resnet_model


def test_warm_up_then_cosine() -> None:
    rates = [warmup_cosine(step, 10, 110, 0.001) for step in range(130)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[60] == pytest.approx(0.5005)
    assert rates[35] == pytest.approx(0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110:] == pytest.approx([0.001] * 20)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_edges_and_bad_lengths() -> None:
    assert warmup_cosine(0, 0, 10) == 1
    assert warmup_cosine(4, 5, 5) == 1
    assert warmup_cosine(5, 5, 5, 0.01) == warmup_cosine(9, 5, 5, 0.01) == warmup_cosine(0, 0, 0, 0.01) == 0.01
    for warmup in (-1, 11):
        with pytest.raises(ValueError, match=f"warmup_steps={warmup}"):
            warmup_cosine(0, warmup, 10)


def test_only_matrices_decay() -> None:
    model = resnet_model()
    model.heads["task.0"].requires_grad_(False)
    decay, keep = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in (decay, keep))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert {"encoder.conv1.weight", "aggregator.attention.key_proj.weight", "heads.1:task%2E1.weight"} <= set(decayed)
    assert {
        "encoder.bn1.weight",
        "aggregator.attention.queries",
        "aggregator.mlp.0.bias",
        "heads.1:task%2E1.bias",
    } <= set(kept)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(decayed + kept) == sorted(trainable)
    torch.optim.AdamW([decay, keep])


def test_groups_have_their_own_rate() -> None:
    model = resnet_model()
    groups = parameter_groups(model, 0.1, {"encoder.": 0.25})
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (0.25, 0.1), (0.25, 0.0), (1.0, 0.1), (1.0, 0.0),
    ]  # fmt: skip
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == (0.25 if name.startswith("encoder.") else 1.0), name


def test_the_scheduler_is_the_schedule() -> None:
    """Group by group, and after a restart from its state."""
    model = resnet_model()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, {"encoder.": 0.25}), lr=0.5)
    scheduler = warmup_cosine_scheduler(optimizer, 3, 11, 0.01)
    for step in range(13):
        if step == 5:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            scheduler = warmup_cosine_scheduler(optimizer, 3, 11, 0.01)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        rates = [group["lr"] for group in optimizer.param_groups]
        rate = 0.5 * warmup_cosine(step, 3, 11, 0.01)
        assert rates == pytest.approx([0.25 * rate, 0.25 * rate, rate, rate])
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match="warmup_steps=5"):
        warmup_cosine_scheduler(torch.optim.SGD(model.parameters(), lr=1.0), 5, 4)
