"""The training loop: a generator of steps. It knows neither Ray nor MLflow; draining it trains the model.

One step: select without gradients (paper Algorithm 1), encode the M winners of each slide with gradients,
aggregate, one loss on logits, one optimiser step. Over several ranks gradients are summed and the loss is
normalised by the global count, so the same global batch gives the same step on any number of ranks.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ips.bag import Bag, Selection
from ips.learning.gradient import bounded_backward
from ips.learning.schedule import warmup_cosine
from ips.network.context import joined
from ips.network.model import IPSModel
from ips.selection.baselines import RandomDraw, every_patch, random_selection
from ips.selection.pools import Draw
from ips.selection.ranking import ByAttention
from ips.selection.scorer import Scorer
from ips.selection.select import gather, select
from pipeline.config.model import SelectConfig, TrainConfig
from pipeline.errors import StageError
from pipeline.training.hands import Slides, Waits, each_image, hand_loss, select_hand
from pipeline.training.headroom import memory_advice, untouched
from pipeline.training.plan import (
    ShardAbove,
    Step,
    balanced_slides,
    dealt,
    epoch_batches,
    longest_hand,
    steps_per_epoch,
)
from pipeline.training.ranks import Ranks, average_statistics, sum_gradients
from pipeline.training.winners import Turns, Winners

DIVERGED = "lower train.lr or set train.clip_norm; the last checkpoint is kept"
LR_FLOOR = 1e-3  # the cosine ends at lr / 1000 (official code)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepDone:
    """One optimiser step, as all ranks see it."""

    epoch: int
    step: int
    """Steps taken so far, this one included."""
    last_of_epoch: bool
    loss: float
    lr: float
    slides: int
    patches: int
    """Of the slides."""
    read: int
    """Of them, but for those that nobody looked at since the slide's winners were known."""
    seconds: float
    waited: float
    """Seconds of them in which this rank waited for patches to be read and decoded."""
    changed: tuple[float, ...] = ()
    """Of each slide that was scored again after its winners had served: which share of them are others now."""
    chosen: Mapping[int, Tensor] = field(default_factory=dict)
    """Of this rank's last slides, by index: the rows that were selected, best first."""


def train_steps(
    model: IPSModel,
    optimizer: torch.optim.Optimizer,
    slides: Slides,
    settings: TrainConfig,
    selecting: SelectConfig,
    *,
    seed: int,
    start_epoch: int,
    start_step: int = 0,
    ranks: Ranks,
    winners: Winners | None = None,
) -> Iterator[StepDone]:
    """Train from step `start_step` of `start_epoch` to the last epoch; StageError on a loss or gradient not finite.

    Before the first step the largest bags go through one, which changes nothing: StageError where memory runs out.
    `winners`, as they were at the start, are kept up to date; without, every visit scores its slide.
    """
    per_epoch = steps_per_epoch(len(slides.sizes), settings.batch_size)
    warmup, total = round(settings.warmup_epochs * per_epoch), settings.epochs * per_epoch
    turn = _Turn(model, slides, settings, selecting, ranks, winners, seed)
    if start_epoch < settings.epochs:
        plans = (plan for _, plan in turn.plans(start_epoch, start_step))
        turn.try_largest(start_epoch, longest_hand(plans, len(slides.sizes)))
    for epoch, plan in turn.plans(start_epoch, start_step):
        slides.announce(turn.order(plan, epoch))
        for number, hands in enumerate(plan, start=per_epoch - len(plan)):
            began, waited = time.perf_counter(), turn.waits.seconds
            step = epoch * per_epoch + number
            lr = settings.lr * warmup_cosine(step, warmup, total, LR_FLOOR)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            torch.manual_seed((seed * 1_000_003 + step) * 1009 + ranks.rank)
            taken = hands.slides
            where = f"{moment(epoch, step + 1, lr)[:-1]}, slides {', '.join(slides.named(taken))})"
            loss = turn.gradients(hands, epoch, where)
            optimizer.step()
            changed = turn.note(hands, epoch)
            sizes = [slides.sizes[index] for index in taken]
            read = [min(n, selecting.memory) if i in hands.served else n for i, n in zip(taken, sizes, strict=True)]
            patches, seconds = (sum(sizes), sum(read)), time.perf_counter() - began
            last, waited = number + 1 == per_epoch, turn.waits.seconds - waited
            yield StepDone(epoch, step + 1, last, loss, lr, len(taken), *patches, seconds, waited, changed, turn.chosen)


def moment(epoch: int, step: int, lr: float) -> str:
    """A step for messages; `epoch` counts from 0, steps from 1."""
    return f"step {step} (epoch {epoch + 1}, lr {lr:g})"


class _Turn:
    """What one rank does of a step: its gradients, summed over all ranks."""

    def __init__(
        self,
        model: IPSModel,
        slides: Slides,
        settings: TrainConfig,
        selecting: SelectConfig,
        ranks: Ranks,
        winners: Winners | None,
        seed: int,
    ) -> None:
        self.model, self.slides, self.settings, self.selecting, self.ranks = model, slides, settings, selecting, ranks
        self.winners, self.seed = winners, seed
        self.found: dict[int, Tensor] = {}  # in the step under way: slide -> rows (M,)
        self.waits = Waits()
        self.chosen: Mapping[int, Tensor] = {}
        self.scorer: Scorer | None = None
        if selecting.mode in ("exact", "window"):
            dtype = torch.bfloat16 if settings.score_dtype == "bfloat16" else None  # the model's own
            self.scorer = Scorer(model, dtype=dtype, batch=settings.score_batch, compile=settings.compile)

    def plans(self, start_epoch: int, start_step: int) -> Iterator[tuple[int, list[Step]]]:
        """Each epoch, and the steps of it that are still to be taken."""
        turns = None if self.winners is None else self.winners.turns.copy()
        for epoch in range(start_epoch, self.settings.epochs):
            first = start_step if epoch == start_epoch else 0
            yield epoch, self._plan(epoch, first, None if self.explores(epoch) else turns)

    def _plan(self, epoch: int, first: int, turns: Turns | None) -> list[Step]:
        """The epoch's steps from the `first` on; with balanced sampling over the slides that it draws.

        `turns` as they are before that step are led to the end of the epoch; None where no winners serve.
        """
        settings, slides, sharing, seed = self.settings, self.slides, self._sharing(epoch), self.seed
        drawn = list(range(len(slides.sizes)))
        if settings.sampling == "balanced":
            task = next(iter(slides.kinds))
            classes = [target[task] for target in slides.targets]
            drawn = balanced_slides([c if isinstance(c, float | int) else math.nan for c in classes], seed, epoch)
        costs = [slides.sizes[index] for index in drawn]
        batches = epoch_batches(
            costs, batch_size=settings.batch_size, seed=seed, epoch=epoch, window=settings.balance_window
        )
        steps = []
        for batch in batches[first:]:
            served = turns.visit({drawn[place] for place in batch}) if turns is not None else frozenset[int]()
            for place in batch:
                if drawn[place] in served:
                    costs[place] = min(costs[place], self.selecting.memory)
            steps.append(dealt(batch, costs, self.ranks.world_size, sharing).of(drawn, served))
        return steps

    def _sharing(self, epoch: int) -> ShardAbove:
        """Which slides all ranks select together: only an exact selection is the same however it is shared."""
        exact = self.selecting.mode == "exact" and not self.explores(epoch)
        whole = self.settings.source == "stream"  # a streamed slide stays on one rank
        return self.settings.shard_above if exact and not whole and self.ranks.group is not None else None

    def order(self, plan: Sequence[Step], epoch: int) -> list[int]:
        """The slides that this rank will score alone, one after another."""
        if self.scorer is None or (self.explores(epoch) and self.selecting.context == "none"):
            return []
        own = ((step, index) for step in plan for index in step.hands[self.ranks.rank])
        return [index for step, index in own if index not in step.shared and index not in step.served]

    def gradients(self, hands: Step, epoch: int, where: str) -> float:
        """Put the gradients of a step, clipped, into the model; the loss over all hands.

        Raises:
            StageError: the loss or a gradient is not finite, on any rank; the weights are as they were.
        """
        mine, model = hands.hands[self.ranks.rank], self.model
        self._set_modes(epoch)
        model.zero_grad(set_to_none=True)
        try:
            loss = self._accumulate(hands, epoch)
        except ValueError as error:  # `ips` refuses patches and logits that are not finite
            raise StageError(f"{error}, at {where}; {DIVERGED}") from error
        loss = loss.double()  # also where a rank without slides has no model's precision
        self.ranks.sum_(loss)
        sum_gradients(model, self.ranks)
        if self.settings.norm != "frozen" and model.encoder.training:  # a mean of three would round
            average_statistics(model, self.ranks, weight=float(bool(mine)))
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not loss.isfinite() or not norm.isfinite():
            what = "loss" if not loss.isfinite() else "gradient's norm"
            value = float(loss if not loss.isfinite() else norm)
            raise StageError(f"the {what} became {value} at {where}; {DIVERGED}")
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), self.settings.clip_norm, norm)
        return float(loss)

    def note(self, hands: Step, epoch: int) -> tuple[float, ...]:
        """Keep the winners of a step that was taken; how they changed (`Winners.note`)."""
        if self.winners is None or self.explores(epoch):
            return ()
        return self.winners.note(hands, self.found, self.ranks, self.model.mean.device)

    def explores(self, epoch: int) -> bool:
        """Whether the epoch trains on random patches."""
        return epoch < self.settings.explore_epochs

    def try_largest(self, epoch: int, longest: int) -> None:
        """Take a step on as many of the largest bags as a rank ever gets in one, and leave no trace of it.

        The largest one is selected from; of the others, whose selection needs no more memory, rows are drawn. An
        encoder that is frozen at first has gradients already: it will need the memory when it thaws.

        Args:
            epoch: whose augmentation the bags have.
            longest: slides of a rank in one step, at most.
        """
        settings, slides = self.settings, self.slides
        largest = sorted(range(len(slides.sizes)), key=lambda index: -slides.sizes[index])
        hand = largest[: min(longest, settings.micro_batch or longest)]
        with untouched(self.model):
            self._set_modes(max(epoch, settings.freeze_encoder_epochs))
            bags = [slides.bag(index, epoch) for index in hand]
            try:
                one, every = self._winners(hand[:1], bags[:1], settings.explore_epochs).rest, self._drawn(bags)
                every = every if one is None else replace(every, rest=joined([one] * len(bags)))
                self._backward(bags, every, hand, hand)
            except ValueError as error:
                names = ", ".join(slides.named(hand))
                raise StageError(f"{error}, when the largest slides ({names}) were tried before step 1") from error

    def _set_modes(self, epoch: int) -> None:
        """Training mode; a frozen encoder has no gradients, and its statistics stay."""
        frozen = self.settings.freeze_encoder or epoch < self.settings.freeze_encoder_epochs
        self.model.train()
        self.model.encoder.requires_grad_(not frozen)
        if frozen:
            self.model.encoder.eval()

    def _accumulate(self, hands: Step, epoch: int) -> Tensor:
        """Add up the gradients of this rank's slides, a micro-batch at a time; its part of the loss."""
        mine = hands.hands[self.ranks.rank]
        known = (
            {} if self.winners is None else {slide: self.winners.of(slide) for slide in hands.served.intersection(mine)}
        )
        self.found = {}
        if hands.shared:  # first of all: every rank comes from the same sum of gradients, and none waits for another
            bags = [self._bag(index, epoch) for index in hands.shared]
            shared = self._winners(hands.shared, bags, epoch, self.ranks.group)
            known |= zip(hands.shared, each_image(shared), strict=True)
        size = self.settings.micro_batch or max(1, len(mine))
        loss = torch.zeros((), device=self.model.mean.device)
        for start in range(0, len(mine), size):
            hand = mine[start : start + size]
            bags = [self._bag(index, epoch) for index in hand]
            winners = select_hand(hand, bags, known, partial(self._winners, epoch=epoch))
            loss = loss + self._backward(bags, winners, hand, hands.slides)
            self.found |= zip(hand, winners.index, strict=True)
            self.chosen = {slide: winners.index[n][winners.mask[n]] for n, slide in enumerate(hand)}
        return loss

    def _bag(self, index: int, epoch: int) -> Bag:
        return self.waits.watched(self.slides.bag(index, epoch))

    def _winners(
        self, hand: Sequence[int], bags: Sequence[Bag], epoch: int, group: dist.ProcessGroup | None = None
    ) -> Selection:
        selecting, explores = self.selecting, self.explores(epoch)
        mode, pools, sizes = selecting.mode, selecting.context == "all", (selecting.memory, selecting.chunk)
        if mode == "random" or mode == "every" or (explores and not pools):
            return self._drawn(bags)
        draw = self._draw(hand, epoch) if pools else None
        with memory_advice(self.settings, selecting, "selection"):
            return select(
                self.model,
                bags,
                *sizes,
                "exact" if explores else mode,  # drawn ones are the same in both
                scorer=self.scorer,
                group=group,
                context="rest" if pools else None,
                draw=draw,
                rank="mean" if draw else selecting.rank,
            )

    def _draw(self, hand: Sequence[int], epoch: int) -> Draw | Sequence[Draw] | None:
        """Of which patches of some slides the encoder learns, alike whoever has them in hand; None: of the winners."""
        if self.explores(epoch):
            return RandomDraw(torch.default_generator)
        if self.selecting.learn_from == "best":
            return None
        return [ByAttention(zlib.crc32(f"{self.seed} {epoch} {index}".encode())) for index in hand]

    def _drawn(self, bags: Sequence[Bag]) -> Selection:
        """Winners that need no scores."""
        if self.selecting.mode == "every":
            return every_patch(bags)
        return random_selection(bags, self.selecting.memory, torch.default_generator)

    def _backward(
        self, bags: Sequence[Bag], winners: Selection, mine: Sequence[int], everyone: Sequence[int]
    ) -> Tensor:
        """Add the gradients of some slides; their part of the loss, detached."""
        model, settings = self.model, self.settings
        dtype = _DTYPES[settings.compute_dtype]

        def loss(outputs: dict[str, Tensor]) -> Tensor:
            return hand_loss(outputs, self.slides, mine, everyone)

        with memory_advice(settings, self.selecting, "gradient pass"):
            if settings.norm != "batch":
                return bounded_backward(model, bags, winners, loss, settings.grad_chunk, settings.norm, dtype)[0]
            device = model.mean.device
            batch = gather(bags, winners, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = model(batch)
            value = loss(outputs)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()
