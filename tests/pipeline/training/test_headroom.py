from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.errors import StageError
from pipeline.training.headroom import Part, forget_peak, memory_advice, peak_bytes, untouched

PETABYTE = 2**50


@pytest.mark.parametrize(
    ("fields", "part", "advice"),
    [
        (
            {},
            "selection",
            r"; lower train.score_batch \(null, which is 256 on a GPU and 32 on a CPU\); above that number, "
            "model.select.chunk=256 too$",
        ),
        ({"score_batch": 64}, "validation", r"; lower train.score_batch \(64\); above that number, model.select"),
        (
            {},
            "gradient pass",
            r"lower model.select.memory=64 or train.batch_size=16, set train.micro_batch, or set train.bounded",
        ),
        (
            {"micro_batch": 2},
            "gradient pass",
            "lower model.select.memory=64 or train.micro_batch=2, or set train.bounded=true",
        ),
        (
            {"bounded": True, "norm": "group"},
            "gradient pass",
            "lower train.grad_chunk=64; if that does not do, model.select.memory",
        ),
    ],
)
def test_running_out_says_what_to_lower(fields: dict[str, Any], part: Part, advice: str) -> None:
    with (
        pytest.raises(StageError, match=rf"out of memory in the {part} .*allocate.*{advice}"),
        memory_advice(TrainConfig(**fields), SelectConfig(), part),
    ):
        torch.empty(PETABYTE, dtype=torch.uint8)  # the allocator truly refuses it


@pytest.mark.parametrize("mode", ["random", "every"])
def test_where_nothing_is_scored_the_chunk_alone_counts(mode: Any) -> None:
    with (
        pytest.raises(StageError, match="; lower model.select.chunk=256$"),
        memory_advice(TrainConfig(), SelectConfig(mode=mode), "validation"),
    ):
        torch.empty(PETABYTE, dtype=torch.uint8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_advice(TrainConfig(), SelectConfig(), "selection"):
        torch.zeros(2).view(3)


def test_a_tried_step_leaves_no_trace() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(3, 3), norm, nn.Dropout())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    for fails in (False, True):
        try:
            with untouched(net):
                net(torch.randn(7, 3)).sum().backward()
                assert norm.num_batches_tracked == 1
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert all(parameter.grad is None for parameter in net.parameters())
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.rand(4), expected)


def test_a_peak_is_of_what_came_since_it_was_forgotten() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    big = torch.ones(2**26, dtype=torch.float32, device=device)  # 256 MiB
    before = peak_bytes()
    del big
    forget_peak()
    assert peak_bytes() < before - 2**27
    forget_peak()
    calm = peak_bytes()
    other = torch.ones(2**25, dtype=torch.float32, device=device)
    assert peak_bytes() >= calm + 0.9 * other.nbytes
