"""Whether aids of end-to-end training help: `python -m tests.bench.aids`, half an hour on one core.

But for `explore`, `drawn` and `product` none is in the product; here each is a rule about a network of two layers that
learns from scratch.

    few      lesions are few among 5,000 patches and more, and fainter than in `tests.bench.reselect`; M = 16
    burden   the cohort of `tests.bench.context`, M = 8

each with the winners alone in the pool, and with all patches (`context`).

    plain        the best M by the mean attention of all heads
    explore      random ones in the first third of the epochs
    share S      of the M so many are drawn at random from what is not among the best (half of them: DBPS)
    temper T     logits are divided by T
    entropy B    of each head's attention, B times, is taken off the loss
    drawn        with context: M by their attention, as the product draws them (`ips.ByAttention`); alike: the same
                 patches, but none weighs more than another
    full         with context: the encoder learns from all patches
    product R    without context: in the product's own loop, with `model.select.rank` R; mean is as plain

All patches of a slide are encoded at each step, and the rule says of which the encoder learns, as its gradient does not
depend on whether others are kept; so a rule is a line, and a training takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ips.learning.schedule import warmup_cosine
from ips.network.attention import CrossAttention
from ips.network.model import IPSModel
from ips.selection.ranking import ByAttention, Rank
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.model.build import build_optimizer
from tests.bench import context, lesions
from tests.bench.lesions import DIM, TASK, Cohort, Law, draw, mean_and_spread, network, stamp

FEW = Law(patches=(5000, 5500), lesions=((0.0, 0.0), (0.003, 0.006)), marked=0.02, contrast=2.5, own=4.5)
BATCH, LR = 8, 2e-3


@dataclass(frozen=True)
class Aid:
    """How a network learns; of the defaults, as the paper's."""

    memory: int
    context: bool = False
    explore: float = 0.0
    """Of the epochs."""
    share: float = 0.0
    temper: float = 1.0
    entropy: float = 0.0
    drawn: bool = False
    weighted: bool = True
    """Drawn patches by one over their chance."""

    def weights(self, attention: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """(N, J) attention over all patches -> (N,): what each one's gradient to the encoder is multiplied by."""
        N = len(attention)
        chosen = torch.zeros(N)
        if progress < self.explore:
            chosen[torch.randperm(N, generator=generator)[: self.memory]] = 1
        elif self.drawn:
            turn = int(torch.randint(2**31, (), generator=generator))
            rows, weights = ByAttention(turn)(attention.double().mean(dim=1).log(), self.memory)
            chosen[rows] = weights if self.weighted else 1.0
        else:
            order = attention.mean(dim=1).argsort(descending=True, stable=True)
            kept = self.memory - round(self.share * self.memory)
            others = order[kept:]
            chosen[order[:kept]] = 1
            chosen[others[torch.randperm(len(others), generator=generator)[: self.memory - kept]]] = 1
        return chosen


class Tempered(CrossAttention):
    """Logits divided by a temperature."""

    temper = 1.0

    def folded(self) -> Tensor:
        """As those of a `CrossAttention`."""
        return super().folded() / self.temper


def trained(cohort: Cohort, aid: Aid, epochs: int, seed: int) -> IPSModel:
    """A network that has learned from the cohort."""
    settings = TrainConfig(epochs=epochs, batch_size=BATCH, lr=LR, warmup_epochs=1)
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    attention = Tempered(DIM, 1, 8, 8, 8)
    attention.load_state_dict(model.aggregator.attention.state_dict())  # type: ignore[union-attr]
    model.aggregator.attention, attention.temper = attention, aid.temper
    optimizer, loss_of = build_optimizer(model, settings), nn.BCEWithLogitsLoss()
    per_epoch = len(cohort.bags) // BATCH
    torch.manual_seed(seed)
    model.train()
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(cohort.bags), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = LR * warmup_cosine(step, per_epoch, epochs * per_epoch) * group.get("lr_scale", 1.0)
        some = order[step % per_epoch * BATCH :][:BATCH].tolist()
        optimizer.zero_grad()
        for slide in some:
            output, spread = _answer(model, cohort.bags[slide].take(torch.arange(len(cohort.bags[slide]))).patches,
                                     aid, step / (epochs * per_epoch), generator)  # fmt: skip
            target = torch.tensor([float(cohort.labels[slide])])
            ((loss_of(output, target) - aid.entropy * spread) / len(some)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def _answer(
    model: IPSModel, patches: Tensor, aid: Aid, progress: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The logit of a slide, (1,), and the entropy of its attention, mean over heads."""
    attention: Tempered = model.aggregator.attention  # type: ignore[assignment]
    with torch.no_grad():
        x = model.encoder(patches)
        over_all = attention.logits(x).softmax(dim=0)
    weights = aid.weights(over_all, progress, generator)
    rows = weights.nonzero()[:, 0]
    learning = model.encoder(patches[rows])
    share = weights[rows].unsqueeze(1)
    learning = share * learning + (1 - share) * learning.detach()  # the value as it is, the gradient weighed
    pooled = x.index_copy(0, rows, learning) if aid.context else learning
    tokens = model.aggregator(pooled.unsqueeze(0), torch.ones(1, len(pooled), dtype=torch.bool))
    log_a = attention.logits(pooled).log_softmax(dim=0)
    return model.heads(tokens)[TASK].view(1), -(log_a.exp() * log_a).sum(dim=0).mean()


@torch.no_grad()
def auc(model: IPSModel, cohort: Cohort, aid: Aid) -> float:
    """Of the answers to all slides; no patch is drawn at random."""
    model.eval()
    settled = replace(aid, explore=0.0, share=0.0, drawn=False)
    none = torch.Generator()
    scores = [
        float(_answer(model, bag.take(torch.arange(len(bag))).patches, settled, 1.0, none)[0]) for bag in cohort.bags
    ]
    values, labels = torch.tensor(scores), torch.tensor(cohort.labels)
    over = values[labels == 1].unsqueeze(1) - values[labels == 0]
    return float((over > 0).double().mean() + 0.5 * (over == 0).double().mean())


def by_rule(aid: Aid, epochs: int, seed: int, train: Cohort, test: Cohort) -> float:
    """Test AUC of a network that has learned by a rule."""
    return auc(trained(train, aid, epochs, seed), test, aid)


def by_product(rank: Rank, memory: int, epochs: int, seed: int, train: Cohort, test: Cohort) -> float:
    """Test AUC of a network that the product has trained."""
    settings = TrainConfig(epochs=epochs, batch_size=BATCH, lr=LR, warmup_epochs=1, augment=False, score_batch=1024)
    selecting = SelectConfig(memory=memory, chunk=1024, rank=rank)
    return lesions.auc(lesions.trained(train, settings, selecting, seed), test, selecting)


def aids(base: Aid) -> Iterator[tuple[str, Aid]]:
    """What is tried on a cohort."""
    yield "plain", base
    yield "explore", replace(base, explore=0.4)
    for share in (0.25, 0.5):
        yield f"share {share}", replace(base, share=share)
    for temper in (0.5, 2.0):
        yield f"temper {temper}", replace(base, temper=temper)
    for entropy in (0.01, 0.1):
        yield f"entropy {entropy}", replace(base, entropy=entropy)
    if base.context:
        yield "drawn", replace(base, drawn=True)
        yield "drawn, alike", replace(base, drawn=True, weighted=False)
        yield "explore, drawn", replace(base, drawn=True, explore=0.4)
        yield "full", replace(base, memory=10**6)


SCENES: dict[str, tuple[Law, int, int, Aid]] = {
    "few": (FEW, 48, 16, Aid(16)),
    "few, context": (FEW, 48, 16, Aid(16, context=True)),
    "burden": (context.LAW, 200, 14, Aid(8)),
    "burden, context": (context.LAW, 200, 14, Aid(8, context=True)),
}
"""Law, slides, epochs, and what is varied."""


def trials(base: Aid, epochs: int) -> Iterator[tuple[str, Callable[[int, Cohort, Cohort], float]]]:
    """Names, and what makes test AUCs of a seed and two cohorts."""
    for name, aid in aids(base):
        yield name, partial(by_rule, aid, epochs)
    ranks: tuple[Rank, ...] = () if base.context else ("mean", "heads")
    for rank in ranks:
        yield f"product {rank}", partial(by_product, rank, base.memory, epochs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--only", nargs="+", help="aids to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for scene in options.scenes:
        law, slides, epochs, base = SCENES[scene]
        cohorts = {seed: [draw(law, slides, 2 * seed + side) for side in (1, 2)] for seed in options.seeds}
        print(f"| {scene} | test AUC |\n|---|---|", flush=True)
        for name, run in trials(base, epochs):
            if options.only and name not in options.only:
                continue
            began = time.process_time()
            aucs = [run(seed, *both) for seed, both in cohorts.items()]
            found.setdefault(scene, {})[name] = aucs
            print(f"| {name} | {mean_and_spread(aucs)} |", flush=True)
            print(f"{scene}, {name}: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({**stamp(), "auc": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
