"""Peak memory of selection and bounded backward as images grow: `python -m tests.bench.memory`.

Each line is a process of its own. On a CPU the peak is that of the resident set; on a GPU that of allocated memory.

What keeps it flat: chunks are scored and dropped; of a patch stay its J logits (32 B at J = 8) and a flag on the host,
and four 8-byte numbers while it is ranked; the winners are taken again chunk by chunk in the backward pass, so
M = 5,000 costs a few times B * M * D numbers more than M = 64, not B * (5,000 - 64) patches. The bags stay on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ips.learning.gradient import bounded_backward
from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.model import IPSModel
from ips.selection.scorer import Scorer
from ips.selection.select import select
from tests.bench.scenes import EndlessBag

_MIB = 2**20
_GRAD_CHUNK = 16
"""Patches encoded with gradient at once: each saves 21 MiB of activations of a ResNet-18 at 224 px in float32."""


class PoolingStub(nn.Module):
    """An encoder that costs nothing: channel means at three scales."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 16)."""
        out: Tensor = self.linear(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))
        return out


def _loss(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([logits.float().square().mean() for logits in outputs.values()]).sum()


def one(encoder: str, N: int, B: int, M: int, device: torch.device) -> None:
    """Select and step once; print peak MiB, reserved MiB and seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    trunk: ResNet | PoolingStub = ResNet("resnet18") if encoder == "resnet18" else PoolingStub()
    shape = (3, 224, 224) if encoder == "resnet18" else (3, 16, 16)
    model = IPSModel(trunk, Aggregator(trunk.dim, 1, 8, 16, 16, 64), {"t": nn.Linear(trunk.dim, 1)}).to(device).train()
    bags = [EndlessBag(N, shape, seed) for seed in range(B)]
    start = time.perf_counter()
    scorer = Scorer(model, dtype=torch.bfloat16)
    selection = select(model, bags, M, 512 if device.type == "cuda" else 64, scorer=scorer)
    bounded_backward(model, bags, selection, _loss, _GRAD_CHUNK)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{peak / _MIB:.1f} {reserved / _MIB:.1f} {seconds:.1f}")


@dataclass(frozen=True)
class Line:
    """One process's figures."""

    encoder: str
    N: int
    B: int
    M: int
    peak_mib: float
    reserved_mib: float
    seconds: float


@dataclass(frozen=True)
class Goal:
    """`found` MiB may be `allowed` at most."""

    name: str
    found: float
    allowed: float
    lines: list[Line]

    @property
    def met(self) -> bool:
        """Whether it was."""
        return self.found <= self.allowed


def _measure(encoder: str, N: int, B: int, M: int) -> Line:
    """Select and step once in a new process."""
    command = [sys.executable, "-m", "tests.bench.memory", "--one", encoder, str(N), str(B), str(M)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    print(f"  {encoder:9s} N = {N:7d}  B = {B:2d}  M = {M:4d}: {found[0]:>8s} MiB ({found[1]} reserved), {found[2]} s")
    return Line(encoder, N, B, M, *map(float, found))


def _flat_on_host(encoder: str, lengths: list[int], B: int) -> list[Goal]:
    """Growth beyond 100 B a patch stays within 10% of the smallest peak."""
    lines = [_measure(encoder, N, B, 64) for N in lengths]
    allowed = 100 * B * (lengths[-1] - lengths[0]) / _MIB + 0.1 * lines[0].peak_mib
    return [Goal(f"{encoder}: host growth, MiB", lines[-1].peak_mib - lines[0].peak_mib, allowed, lines)]


def _flat_on_device(longest: int, M: int) -> list[Goal]:
    """The same M winners of short and of long images: peaks within 2% of the shortest's and at most 2 GiB."""
    lines = [_measure("resnet18", N, 16, M) for N in (max(1000, M), longest)]
    highest = max(line.peak_mib for line in lines)
    return [
        Goal(f"M = {M}: device growth, MiB", highest - lines[0].peak_mib, 0.02 * lines[0].peak_mib, lines),
        Goal(f"M = {M}: device peak, MiB", highest, 2048, lines),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("ENCODER", "N", "B", "M"), help="a single line, in this process")
    parser.add_argument("--quick", action="store_true", help="a tenth of the patches")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.one:
        encoder, *numbers = options.one
        one(encoder, *map(int, numbers), device)  # type: ignore[call-arg, arg-type]
        return 0
    part = 10 if options.quick else 1
    if device.type == "cuda":
        goals = [goal for M in (64, 5000 // part) for goal in _flat_on_device(250_000 // part, M)]
    else:
        goals = _flat_on_host("resnet18", [1000 // part, 10_000 // part], 2)
        goals += _flat_on_host("stub", [1000, 250_000 // part], 1)
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {goal.found:.1f}, allowed {goal.allowed:.1f}")
    facts = {"device": str(device), "torch": torch.__version__, "quick": options.quick}
    print(json.dumps({**facts, "goals": [{**asdict(goal), "met": goal.met} for goal in goals]}))
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
