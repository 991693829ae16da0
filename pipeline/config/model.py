"""The sections that say what the network is and how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Positive, Section
from pipeline.config.encoders import PRESETS, with_statistics

_NAME = rf"^(resnet18|resnet34|resnet50|features|{'|'.join(PRESETS)}|timm:[A-Za-z0-9_.]+)$"


class EncoderConfig(Section):
    """The patch encoder."""

    name: Annotated[str, Field(pattern=_NAME)] = "resnet18"
    """resnet18, resnet34, resnet50; features: a projector of stored features (the paper's CAMELYON16 setting);
    timm:NAME: a network of the timm library (pip install 'ips-pipeline[timm]'); uni, uni2, virchow, virchow2, gigapath,
    h-optimus-0, h-optimus-1, phikon-v2: pathology encoders (`pipeline.config.encoders`), by which the tiling's
    patch_px and mpp, and mean and std, go where they are not given."""
    stages: Literal[2, 4] = 4
    """Residual stages kept; 2 is the paper's Megapixel-MNIST trunk (paper section 4). ResNets only."""
    channels: Literal[1, 3] = 3
    """Of the patches' pixels; those of stored slides have 3."""
    features: Positive | None = None
    """features: width of the stored features."""
    dim: Positive | None = None
    """features: width D of the embeddings made of them. null: 512."""
    weights: str | None = None
    """Path or URI of a .safetensors file, or of a .pth file of tensors only, with torchvision's key names (timm's
    for timm:NAME; of a pathology encoder as it is published). hf:OWNER/NAME/FILE: from huggingface.co, once; hf: alone,
    that of the pathology encoder (pip install huggingface_hub; its terms are accepted there). null: from scratch;
    nothing is ever downloaded unasked."""

    @model_validator(mode="after")
    def _features(self) -> Self:
        if self.name == "features" and self.features is None:
            raise ValueError("name: features needs the width of the stored features; set features, as in 1024")
        if self.name != "features" and (self.features, self.dim) != (None, None):
            raise ValueError(f"features and dim belong to name: features, not to {self.name}; remove them")
        return self


class AggregatorConfig(Section):
    """The pooling of the selected patches' embeddings."""

    pool: Literal["attention", "gated", "mean", "max"] = "attention"
    """attention: the paper's transformer (section 3), whose attention also selects. The baselines gated (ABMIL, Ilse
    et al. 2018), mean and max cannot select: use them with select.mode random or every."""
    heads: Positive = 8
    key_dim: Positive = 16
    """Width of one head's keys and values."""
    hidden_dim: Positive = 512
    """Width of the MLP; of the gate, for pool: gated."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class SelectConfig(Section):
    """The selection (paper Algorithm 1)."""

    mode: Literal["exact", "window", "random", "every"] = "exact"
    """exact: softmax over the whole image. window: the official loop, softmax over the M + I pool. The baselines
    random (M patches drawn anew each epoch, and always the same ones at evaluation) and every (all patches, where they
    fit into memory)."""
    memory: Positive = 64
    """M, patches kept an image; every keeps all."""
    chunk: Positive = 256
    """I, patches read at a time; in window mode it changes the result."""
    rank: Literal["mean", "heads"] = "mean"
    """Which M are the best. mean: by the mean attention of all heads and tasks, the paper. heads: each head for each
    task takes in turn the patch that it attends to most of those left (`ips.selection.ranking.in_turns`), so that one
    head which has found rare patches is not outvoted; exact and window then keep the same ones, each in its own order.
    The last of heads x tasks have no turn where M is smaller.
    What is shown, as attention and scores, is the mean of all heads for either."""
    context: Literal["none", "all"] = "none"
    """What is pooled beside the M patches (`ips.network.context`). none: nothing, the paper. all: the other N - M,
    without gradient to the encoder; M then does not change what a model says of a slide, and the attention learns from
    all patches. exact and window only: they see all patches anyway. In training, train.norm batch and group normalise
    the M by their own statistics and the others by the running ones; frozen makes no difference between them. For
    answers in all patches."""
    learn_from: Literal["best", "drawn"] = "best"
    """With context: all, of which M patches the encoder learns. best: those that win. drawn: M drawn by their attention
    anew each epoch and weighed, so that the mean of the encoder's gradient is that of all patches (`ips.ByAttention`);
    exact only. drawn where very many patches of a slide decide alike; where it is few, they are hardly ever drawn while
    the attention is still even."""


class ModelConfig(Section):
    """The network."""

    encoder: EncoderConfig = EncoderConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    select: SelectConfig = SelectConfig()
    positions: Literal["none", "index", "grid"] = "none"
    """What is added to a patch's embedding: index: sinusoids of its row in the bag (the paper's); grid: 2-D sinusoids
    of its grid column and row."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.229, 0.224, 0.225)
    """Normalisation of pixels scaled to 0..1, a value a channel; features are never normalised."""

    @model_validator(mode="before")
    @classmethod
    def _statistics(cls, data: Any) -> Any:
        return with_statistics(data)

    @model_validator(mode="after")
    def _channels(self) -> Self:
        channels = self.encoder.channels
        if self.encoder.name != "features" and not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}, for patches of {channels} channels; give "
                "both one a channel"
            )
        return self

    @model_validator(mode="after")
    def _context(self) -> Self:
        mode = self.select.mode
        if self.select.context == "all" and mode in ("random", "every"):
            why = "every keeps all patches already" if mode == "every" else "random looks at no others"
            raise ValueError(f"select.context: all does not go with select.mode: {mode} ({why}); set context: none")
        return self

    @model_validator(mode="after")
    def _learn_from(self) -> Self:
        select = self.select
        if select.learn_from == "drawn" and (select.mode, select.rank) != ("exact", "mean"):
            raise ValueError(
                f"select.learn_from: drawn, by the mean attention in the whole slide, does not go with select.mode: "
                f"{select.mode} and rank: {select.rank}; set mode: exact and rank: mean, or learn_from: best"
            )
        return self

    @model_validator(mode="after")
    def _pool(self) -> Self:
        pool, mode = self.aggregator.pool, self.select.mode
        if pool != "attention" and mode in ("exact", "window"):
            raise ValueError(
                f"aggregator.pool: {pool} has no attention that could select; set select.mode to random or every, "
                "or pool: attention"
            )
        return self


class TrainConfig(Section):
    """The optimisation."""

    source: Literal["store", "stream"] = "store"
    """Where patches come from (execution: they are the same). store: the tile stage stores them. stream: it only plans
    them; Ray Data cuts them out of the slides in every epoch and nothing is stored. A patch that cannot be decoded then
    ends the training, and the next run's plan leaves it out like a store, by tiling.max_bad_tiles. Workers share no
    streamed slide: among several, shard_above is null."""
    begins_with: str | None = None
    """Path or URI of the weights.safetensors of a model of the same shape, which training goes on from: all of the
    network, where `model.encoder.weights` is of the encoder alone. null: from scratch, or that."""
    epochs: Positive = 20
    folds: Annotated[int, Field(ge=2)] | str | None = None
    """Cross-validation: so many folds by patient, stratified and seeded, or the column of the cohort that names them;
    `pipeline sweep folds` trains each (execution: which slides train stands in a training's identity). null: none."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Which of the folds tests, from 0 (execution, as `folds`); of the others a share validates, by the val : train of
    cohort.split."""
    batch_size: Positive = 16
    """Slides a step, over all workers."""
    balance_window: Positive = 1
    """Steps that exchange slides among them, so that those of one step are alike in size and no worker waits long for
    another: for fewer than 4 slides a worker and step where shard_above is null. 1: a plain shuffle."""
    shard_above: Positive | Literal["auto"] | None = "auto"
    """Slides of more patches are selected by all workers together, a strip each, and trained on by one. auto: as few
    of a step's largest as keep waiting below a tenth. null: never; so it is in modes other than exact."""
    micro_batch: Positive | None = None
    """Slides that a worker takes the gradient of at a time; a step's gradients add up. Fewer need less memory. null:
    all that it has in the step."""
    bounded: bool = False
    """Encode the winners grad_chunk at a time, twice, instead of all at once: memory then depends on grad_chunk, not
    on batch_size x memory (`ips.learning.gradient`)."""
    grad_chunk: Positive = 64
    """bounded: winners encoded with gradient at a time. With norm: group it changes the result."""
    norm: Literal["batch", "frozen", "group"] = "batch"
    """Statistics of the encoder's batch norms in the gradient pass. batch: of all winners at hand, as in the paper,
    for bounded: false only. For bounded: true, frozen: the running ones, which then never move (for pretrained
    weights); group: of each chunk of winners."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the encoder, on the same schedule. null: lr."""
    freeze_encoder: bool = False
    """The encoder learns nothing and its statistics stay."""
    freeze_encoder_epochs: Annotated[int, Field(ge=0)] = 0
    """The same for so many epochs at the start, until the new layers have settled."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 2.0
    """Linear warm-up, then a cosine to lr / 1000 (official code)."""
    explore_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start that train on M random patches instead of the highest scored. From scratch and with few
    slides the selection can settle on the wrong patches before the network knows any; then it never sees the right
    ones. 0: the paper."""
    reselect_every: Annotated[int, Field(ge=1, le=1000)] = 1
    """Visits of a slide that its winners serve before it is scored again, after the exploration; the first ones serve
    fewer, in turns, so that epochs cost alike. The visits between read M patches and not N. Validation, test and
    prediction score all. Neither for streamed slides nor with model.select.context: all, which need all N each time.
    1: the paper."""
    sampling: Literal["all", "balanced"] = "all"
    """all: each slide once an epoch. balanced: as many slides an epoch, as many of each class of the first task;
    those of rare classes several times, those of frequent classes in turns."""
    validate_every: Positive = 5
    """Epochs between looks at the validation split; the last epoch always looks."""
    monitor: Literal["loss", "score"] = "loss"
    """What early stopping and keep_best go by: the validation loss, or the mean over tasks of the first measure (AUC,
    R2, concordance)."""
    patience: Positive | None = None
    """Looks at the validation split without a better one after which training stops, with the best checkpoint as its
    result. null: never."""
    keep_best: bool = False
    """Keep the checkpoint of the best look beside the last one, and evaluate that; patience always does."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm. null: no clipping."""
    augment: bool = True
    """Flips and right-angle turns, the same in scoring and in the gradient pass; none at evaluation."""
    stain_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Strength s of the colour jitter of a patch: the density of each stain (haematoxylin, eosin, DAB) is
    multiplied by a factor in 1 - s to 1 + s and shifted by up to s (Tellez et al. 2018; `stain.py`). 0: none."""
    score_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the selection pass."""
    score_batch: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Patches that the encoder scores at a time, padded to so many, in training, validation, test and prediction; fewer
    need less memory. A patch's score does not depend on the others, but another number may round it otherwise. null: 32
    on a CPU, 256 on a GPU."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision (autocast) of the gradient pass."""
    compile: bool = False
    """Compile the selection pass (torch.compile): a minute at the start, then faster steps."""
    threads: Positive = 2
    """With which a worker computes on CPUs. Sums that are cut otherwise round otherwise, so the weights depend on this
    and not on `cluster.cpus_per_worker`: what Ray reserves, and how many threads decode."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is the result, instead of the last."""
        return self.keep_best or self.patience is not None

    @model_validator(mode="after")
    def _epochs(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} exceeds epochs={self.epochs}; lower it")
        if self.explore_epochs >= self.epochs:
            raise ValueError(f"explore_epochs={self.explore_epochs} leaves no epoch of {self.epochs} to select in")
        if self.freeze_encoder_epochs >= self.epochs:
            raise ValueError(
                f"freeze_encoder_epochs={self.freeze_encoder_epochs} leaves no epoch of {self.epochs} in which the "
                "encoder learns; lower it, or set freeze_encoder: true"
            )
        return self

    @model_validator(mode="after")
    def _visits(self) -> Self:
        if self.reselect_every > 1 and self.source == "stream":
            raise ValueError(
                f"reselect_every={self.reselect_every} reads only the winners between two scorings, and source: stream "
                "cuts every patch of a slide anew; set reselect_every=1 or source: store"
            )
        return self

    @property
    def readings(self) -> float:
        """How often all patches of the training slides are read in the whole training, about."""
        scoring = self.epochs - self.explore_epochs
        return self.explore_epochs + 1 + (scoring - 1) / self.reselect_every

    @model_validator(mode="after")
    def _folds(self) -> Self:
        if self.fold is not None and self.folds is None:
            raise ValueError(f"fold={self.fold} is one of none; set folds")
        if isinstance(self.folds, int) and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold}: of {self.folds} folds the last one is {self.folds - 1}")
        return self

    @model_validator(mode="after")
    def _norms(self) -> Self:
        if self.bounded == (self.norm == "batch"):
            raise ValueError(
                f"bounded: {str(self.bounded).lower()} does not go with norm: {self.norm}; choose bounded: false with "
                "norm: batch, or bounded: true with norm: frozen or group"
            )
        return self

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        if self.freeze_encoder and (self.freeze_encoder_epochs or self.encoder_lr is not None):
            raise ValueError(
                "freeze_encoder: true leaves freeze_encoder_epochs and encoder_lr nothing to do; drop them"
            )
        if self.stain_jitter and not self.augment:
            raise ValueError(f"stain_jitter={self.stain_jitter:g} is an augmentation, and augment is false; change one")
        return self
