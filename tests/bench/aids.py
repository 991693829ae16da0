"""Whether aids of end-to-end training help: `python -m tests.bench.aids`, some minutes on one core.

The cohort of `tests.bench.reselect` at k = 1: few lesions among 5,000 patches and more, M = 16, three seeds.

    plain      the last weights
    average    the same run, and an exponential average of its weights, as `train.ema` would have it
    half       `model.select.explore_share=0.5`: half of the M drawn at random from what is not among the best
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ips.network.model import unwrapped
from pipeline.config.model import TrainConfig
from tests.bench.lesions import auc, draw, mean_and_spread, stamp, trained
from tests.bench.reselect import EPOCHS, LAW, SELECT

DECAYS = (0.9, 0.98)
SHARES = {"half": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--slides", type=int, default=48, help="to train on, and as many to test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = TrainConfig(epochs=EPOCHS, batch_size=8, lr=2e-3, warmup_epochs=1, augment=False, score_batch=1024)
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        train, test = draw(LAW, options.slides, 2 * seed + 1), draw(LAW, options.slides, 2 * seed + 2)
        averages: dict[float, AveragedModel] = {}

        def average(model: torch.nn.Module, averages: dict[float, AveragedModel] = averages) -> None:
            for decay in DECAYS:
                if decay not in averages:
                    averages[decay] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
                averages[decay].update_parameters(model)

        model = trained(train, settings, SELECT, seed, watch=average)
        results = {"plain": auc(model, test, SELECT)}
        results |= {f"average {decay}": auc(unwrapped(averages[decay]), test, SELECT) for decay in DECAYS}
        for name, share in SHARES.items():
            other = trained(train, settings, SELECT.model_copy(update={"explore_share": share}), seed)
            results[name] = auc(other, test, SELECT)
        for name, value in results.items():
            found.setdefault(name, []).append(value)
        print(f"  seed {seed}: {results}", flush=True)
    print("| aid | test AUC |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {mean_and_spread(values)} |")
    print(json.dumps({**stamp(), "auc": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
