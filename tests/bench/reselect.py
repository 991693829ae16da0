"""What winners cost that serve several visits: `python -m tests.bench.reselect`, some minutes on one core.

Slides of 5,000 patches and more, of which those of one class hold lesions among look-alikes (`tests.bench.lesions`);
M = 16. `train.reselect_every` = 1, 2, 4 and 8, three seeds each, whose cohorts differ too. The encoder is small, so
that all can be trained here: scoring is a smaller part of an epoch than with a ResNet, and so is what is saved of it.

Exits 1 where no k keeps the AUC within the seeds' spread at a third of the time and of the bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

import torch

from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.training.loop import StepDone
from tests.bench.lesions import Law, auc, draw, mean_and_spread, stamp, trained

EVERY = (1, 2, 4, 8)
GOAL = 1 / 3
LAW = Law(patches=(5000, 5500), lesions=((0.0, 0.0), (0.004, 0.008)), marked=0.02, contrast=3.0, own=6.0)
SELECT = SelectConfig(memory=16, chunk=1024)
EPOCHS, EXPLORE = 16, 0


@dataclass
class Run:
    """One training."""

    every: int
    seed: int
    auc: float = 0.0
    loss: float = 0.0
    changed: float | None = None
    """Share of its winners that a slide had exchanged when it was scored again, mean over the last half."""
    epoch_s: float = 0.0
    """CPU time of the epochs in which winners serve, median."""
    epoch_mb: float = 0.0
    """Read in them, mean."""
    share_read: float = 1.0
    losses: list[float] = field(default_factory=list)


def run(every: int, seed: int, slides: int, epochs: int) -> Run:
    """Train and test."""
    train, test = draw(LAW, slides, 2 * seed + 1), draw(LAW, slides, 2 * seed + 2)
    settings = TrainConfig(
        epochs=epochs, batch_size=8, lr=2e-3, warmup_epochs=1, explore_epochs=EXPLORE, augment=False,
        reselect_every=every, score_batch=1024,
    )  # fmt: skip
    found, steps = Run(every, seed), list[StepDone]()
    seconds, read = [0.0] * epochs, [0] * epochs
    spent = time.process_time()

    def after(done: StepDone) -> None:
        nonlocal spent
        steps.append(done)
        seconds[done.epoch] += time.process_time() - spent
        spent = time.process_time()
        read[done.epoch] = train.read

    model = trained(train, settings, SELECT, seed, after)
    steady = range(EXPLORE + 1, epochs)
    found.epoch_s = median(seconds[epoch] for epoch in steady)
    found.epoch_mb = mean(read[epoch] - read[epoch - 1] for epoch in steady) / 1e6
    of_them = [done for done in steps if done.epoch in steady]
    found.share_read = sum(done.read for done in of_them) / sum(done.patches for done in of_them)
    late = [share for done in steps if done.epoch >= epochs // 2 for share in done.changed]
    found.changed = mean(late) if late else None
    found.losses = [mean(done.loss for done in steps if done.epoch == epoch) for epoch in range(epochs)]
    found.loss = found.losses[-1]
    found.auc = auc(model, test, SELECT)
    print(
        f"  k = {every}, seed {seed}: AUC {found.auc:.3f}, loss {found.loss:.3f}, {found.epoch_s:.2f} s an epoch",
        flush=True,
    )
    return found


def table(runs: Sequence[Run]) -> str:
    """As Markdown; times and bytes against k = 1."""
    lines = [
        "| k | test AUC | winners exchanged | patches read | CPU s an epoch | of k = 1 | MB read | of k = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one = [run for run in runs if run.every == 1]
    for every in dict.fromkeys(run.every for run in runs):
        own = [run for run in runs if run.every == every]
        changed = [run.changed for run in own if run.changed is not None]
        took, size = mean(run.epoch_s for run in own), mean(run.epoch_mb for run in own)
        lines.append(
            f"| {every} | {mean_and_spread([run.auc for run in own])} | {f'{mean(changed):.0%}' if changed else ''} | "
            f"{mean(run.share_read for run in own):.1%} | {took:.2f} | {took / mean(run.epoch_s for run in one):.2f} | "
            f"{size:.0f} | {size / mean(run.epoch_mb for run in one):.2f} |"
        )
    return "\n".join(lines)


def best(runs: Sequence[Run]) -> int:
    """The largest k whose mean AUC is not below that of k = 1 by more than the seeds' spread there."""
    aucs = {every: [run.auc for run in runs if run.every == every] for every in EVERY}
    spread = max(stdev(aucs[1]), 0.005) if len(aucs[1]) > 1 else 0.005
    return max(every for every, found in aucs.items() if found and mean(found) >= mean(aucs[1]) - spread)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=48, help="to train on, and as many to test")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kept", type=Path, help="JSON file of runs that are done, to which others are added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: Path | None = options.kept
    runs = [Run(**one) for one in json.loads(kept.read_text())] if kept is not None and kept.exists() else []
    done = {(one.every, one.seed) for one in runs}
    for seed, every in product(options.seeds, EVERY):
        if (every, seed) not in done:
            runs.append(run(every, seed, options.slides, options.epochs))
            if kept is not None:
                kept.write_text(json.dumps([asdict(one) for one in runs]))
    print(table(runs))
    largest = best(runs)
    shares = {}
    for name in ("epoch_s", "epoch_mb"):
        one, other = (mean(getattr(run, name) for run in runs if run.every == k) for k in (1, largest))
        shares[name] = other / one
    print(f"largest k within the seeds' spread: {largest}; of k = 1 an epoch takes {shares}, goal {GOAL:.2f}")
    print(json.dumps({**stamp(), "largest": largest, **shares, "runs": [asdict(run) for run in runs]}))
    return int(max(shares.values()) > GOAL)


if __name__ == "__main__":
    sys.exit(main())
