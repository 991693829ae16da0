"""The configuration: what every field means, its unit and its default. YAML in `conf/` fills it.

Fields are frozen and unknown keys are refused. Fields marked *execution* say where and how fast, never what:
they do not enter any fingerprint, so changing them never makes a stage run again. The sections about slides and
tasks stand in `data`, those about features in `embed`, those about the network and its training in `model`,
those about training it again in `release`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Name, Positive, Section, Seed
from pipeline.config.data import SLIDE_COLUMNS, CohortConfig, TaskConfig, TilingConfig
from pipeline.config.deploy import DeployConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.encoders import PRESETS, differing, with_tiling
from pipeline.config.model import ModelConfig, SelectConfig, TrainConfig
from pipeline.config.release import GateConfig, NotifyConfig, RetrainConfig
from pipeline.config.sweep import SweepConfig


class StorageConfig(Section):
    """Where everything is kept (execution)."""

    root: str = "runs"
    """Folder or s3://bucket/prefix of all that this config makes."""
    patches: str | None = None
    """Patch store; several configs may share one. Default: `<root>/patches`."""
    features: str | None = None
    """Feature store; several configs may share one. Default: `<root>/features`."""


class EvaluateConfig(Section):
    """The test."""

    split: Literal["train", "val", "test"] = "test"
    bootstrap: Positive = 2000
    """Resamples of patients, stratified by the first task's class, behind the confidence intervals."""


class TrackingConfig(Section):
    """MLflow (execution, but for the model's name and registry, where a model is registered anew)."""

    uri: str | None = None
    """Tracking server. null: an SQLite file `mlflow.db` beside the run."""
    experiment: str | None = None
    """Default: the config's name."""
    model: Name | None = None
    """Name in the model registry. Default: the config's name."""


class ClusterConfig(Section):
    """Ray (execution, but for `workers`, which fixes the order of the sums: a range enters as the range)."""

    address: str | None = None
    """`auto` or ray://host:port. null: the Ray job's cluster inside a job, else a local one."""
    workers: int | tuple[int, int] = 1
    """Processes that train. A number, or [least, most]: as many as there is room for, at the start, after a failure
    and, looked at once a minute, when nodes come. A step takes the same slides however many workers there are; sums in
    another order round otherwise, so weights are bit-identical at a fixed number only."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 2.0
    """That Ray reserves, and threads that decode patches; with how many it computes, `train.threads` says."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    readers_per_worker: Positive = 1
    """train.source=stream: tasks that tile for each worker at a time, beside it; each takes tiling.cpus."""
    trainings: Positive | None = None
    """Of folds, or of a search, at most at a time. null: as many as the cluster holds side by side."""
    connect_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """How long Ray may take to start here, or the cluster to answer, before the command gives up with exit code 5."""
    start_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long to wait until there are nodes that could ever hold what is asked for, before giving up with exit code 5;
    `wait_minutes` is for what others use at the moment."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of the training workers after crashes with no checkpoint written in between; one that is starts the
    count anew. Nodes that are taken away after a notice do not count."""
    wait_minutes: Annotated[float, Field(gt=0)] = 30.0
    """How long the training workers may find no room, on a busy cluster or until a lost node is replaced, before the
    training ends with exit code 5; looked at once a minute."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Longest time between two checkpoints; the end of an epoch writes one too. A kill loses no more than this."""
    checkpoint_steps: Positive | None = None
    """Also after every so many optimiser steps. null: by time alone."""

    @property
    def fewest_workers(self) -> int:
        """With which training starts."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """To which training grows."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: object) -> object:
        """One problem instead of one for each member of the union."""
        ends: Sequence[Any] = value if isinstance(value, list | tuple) else [value, value]
        if len(ends) != 2 or not all(type(end) is int and end > 0 for end in ends) or ends[0] > ends[1]:
            raise ValueError("must be a number from 1, or [least, most] as in [1, 4]")
        return value


def _columns_twice(tasks: Sequence[TaskConfig]) -> list[str]:
    """Columns that tables of predictions would have twice, so that one would be lost."""
    holders: dict[str, list[str]] = {column: ["the slide itself"] for column in SLIDE_COLUMNS}
    for task in tasks:
        for what, column in task.result_columns.items():
            holders.setdefault(column, []).append(f"the {what} of task {task.name}")
        for output, column in zip(task.outputs, task.output_columns, strict=True):
            holders.setdefault(column, []).append(f"output {output} of task {task.name}")
    return [
        f"the predictions would have the column {column} twice: of {', and '.join(held)}; rename one"
        for column, held in holders.items()
        if len(held) > 1
    ]


def _metrics_twice(names: Sequence[str]) -> list[str]:
    """Of several tasks each has its own metrics, test_auc_<task>; the interval of their mean is low and high."""
    taken = [name for name in names if name in ("low", "high")]
    return [
        f"metrics would have test_auc_{name} twice: the end of an interval, and of a task; rename the task {name}"
        for name in (taken if len(names) > 1 else ())
    ]


def _encoder_name(section: Any) -> str | None:
    """Of a section that is not validated yet."""
    encoder = section.get("encoder") if isinstance(section, Mapping) else getattr(section, "encoder", None)
    name = encoder.get("name") if isinstance(encoder, Mapping) else getattr(encoder, "name", None)
    return name if isinstance(name, str) else None


class Config(Section):
    """The whole configuration of one recipe."""

    name: Name
    """Names the runs, the experiment and the registered model."""
    seed: Seed = 0
    storage: StorageConfig = StorageConfig()
    cohort: CohortConfig
    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    tiling: TilingConfig = TilingConfig()
    embed: EmbedConfig | None = None
    """Set: patches become features, for `pipeline embed` and for `model.encoder.name: features`; that encoder without
    it takes the features that the cohort names."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig | None = None
    """Set: what `retrain` asks of a model before it becomes champion."""
    retrain: RetrainConfig = RetrainConfig()
    notify: NotifyConfig = NotifyConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    deploy: DeployConfig = DeployConfig()
    sweep: SweepConfig | None = None
    """Set: what `pipeline sweep` compares."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Patches as the encoder of pixels takes them, where the tiling does not say."""
        if not isinstance(data, Mapping):
            return data
        names = [_encoder_name(data.get(section)) for section in ("embed", "model")]
        name = next((name for name in names if name in PRESETS), None)
        return data if name is None else {**data, "tiling": with_tiling(data.get("tiling"), name)}

    @model_validator(mode="after")
    def _tasks(self) -> Config:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: names must differ, found {names}")
        if problems := [*_columns_twice(self.tasks), *_metrics_twice(names)]:
            raise ValueError(f"tasks: {'; '.join(problems)}")
        first = self.tasks[0]
        if self.train.sampling == "balanced" and first.kind not in ("binary", "multiclass"):
            raise ValueError(
                f"train.sampling: balanced needs classes, and the first task, {first.name}, is of kind {first.kind}; "
                "put a binary or multiclass task first"
            )
        return self

    @model_validator(mode="after")
    def _images(self) -> Config:
        if self.cohort.megapixel_mnist is None:
            return self
        if self.tiling.mpp is not None or self.tiling.tissue != "none":
            raise ValueError("cohort.megapixel_mnist: digits have no microns and no tissue; set tiling=image")
        if self.train.augment:
            raise ValueError("cohort.megapixel_mnist: a digit that is turned is another; set train.augment=false")
        if self.tiling.edge_px > min(self.cohort.megapixel_mnist.width, self.cohort.megapixel_mnist.height):
            raise ValueError(f"tiling.patch_px={self.tiling.patch_px} is larger than an image; lower it")
        return self

    @model_validator(mode="after")
    def _channels(self) -> Config:
        found, needed = self.model.encoder.channels, 3 if self.cohort.megapixel_mnist is None else 1
        if self.model.encoder.name != "features" and found != needed:
            what = "patches of slides are RGB" if needed == 3 else "digits are grey"
            raise ValueError(
                f"model.encoder.channels={found}, but {what}; set model.encoder.channels={needed}, and model.mean and "
                "model.std to one value a channel"
            )
        return self

    @model_validator(mode="after")
    def _features(self) -> Config:
        if self.model.encoder.name != "features":
            return self
        problems = []
        if self.train.augment:
            problems.append("train.augment: stored features cannot be flipped or turned; set train.augment=false")
        if problems:
            raise ValueError("; ".join(problems))
        if self.cohort.megapixel_mnist is not None:
            raise ValueError("cohort.megapixel_mnist: its patches are drawn, not stored; choose an encoder of pixels")
        return self

    @model_validator(mode="after")
    def _patients(self) -> Config:
        if self.cohort.bag == "patient" and self.train.source == "stream":
            raise ValueError(
                "cohort.bag: patient needs patches at hand of several slides at once; a stream reads one slide after "
                "another: set train.source=store"
            )
        if self.cohort.bag == "patient" and self.cohort.megapixel_mnist is not None:
            raise ValueError("cohort.bag: patient: made images have no patients; set cohort.bag=slide")
        if self.cohort.bag == "patient" and (self.sweep is not None or self.train.folds is not None):
            raise ValueError("cohort.bag: patient: sweeps and folds score slide by slide; set cohort.bag=slide")
        return self

    @model_validator(mode="after")
    def _stream(self) -> Config:
        made = self.cohort.megapixel_mnist is not None or self.model.encoder.name == "features"
        if self.train.source == "stream" and made:
            raise ValueError("train.source: stream cuts patches out of slides; features and made images need store")
        workers = self.cluster.workers
        if self.train.source == "stream" and not isinstance(workers, int) and workers[0] < workers[1]:
            raise ValueError(
                f"cluster.workers={list(workers)} takes every CPU that it finds, and train.source=stream needs some "
                "beside the workers, for the tasks that tile; set cluster.workers to one number, or train.source=store"
            )
        return self

    @model_validator(mode="after")
    def _reselect(self) -> Config:
        if self.train.reselect_every > 1 and self.model.select.context == "all":
            raise ValueError(
                f"train.reselect_every={self.train.reselect_every} does not read the patches that "
                "model.select.context: all pools; set reselect_every=1 or context: none"
            )
        return self

    @property
    def given_features(self) -> bool:
        """Whether patches are features that other tools have made: the cohort names files of them, no slides."""
        return self.model.encoder.name == "features" and self.embed is None

    @property
    def planned(self) -> bool:
        """Whether the tile stage only says where patches are, and they are read from their source's file."""
        return self.train.source == "stream" or self.given_features

    def departures(self) -> list[str]:
        """In what it departs from what the encoders that it names by preset are made for, in words."""
        found = []
        if self.model.encoder.name != "features":
            found += differing("model", self.model.encoder.name, (self.model.mean, self.model.std), self.tiling)
        if self.embed is not None:
            found += differing("embed", self.embed.encoder.name, (self.embed.mean, self.embed.std), self.tiling)
        return found

    def recipe(self) -> dict[str, Any]:
        """What determines the trained model, as plain data; settings that are new where they are not their default.

        So trainings from before `train.threads`, `reselect_every`, `model.select.context`, `learn_from` and `rank` keep
        their names. `context_rule` says of which patches the encoder learns: 2, those of the release before
        `learn_from`, which drew them in exact mode and took the winners in window mode; 3, the winners in exact mode.
        A frozen encoder learns of none, so that either gives the same training but for rounding: 2.
        What training begins with is named by its content.
        """
        dump = self.model_dump(
            mode="json",
            include={"seed", "tasks", "model", "train"},
            exclude={"train": {"source", "begins_with", "folds", "fold"}},
        )
        if self.train.source == "stream" and self.cluster.workers != 1 and self.model.select.mode == "exact":
            dump["train"]["shard_above"] = None  # streamed slides are never shared, so ranks get other hands
        for name in ("threads", "reselect_every"):
            if getattr(self.train, name) == TrainConfig.model_fields[name].default:
                del dump["train"][name]
        select, dumped = self.model.select, dump["model"]["select"]
        for name in ("rank", "context"):
            if getattr(select, name) == SelectConfig.model_fields[name].default:
                del dumped[name]
        del dumped["learn_from"]
        if select.context == "all":
            taken = (select.mode, select.learn_from) == ("exact", "best") and not self.train.freeze_encoder
            dumped["context_rule"] = 3 if taken else 2
        return {**dump, "workers": self.cluster.workers, "split": self.cohort.split.model_dump()}
