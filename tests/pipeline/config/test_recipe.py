from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.base import fingerprint
from pipeline.config.data import TilingConfig
from pipeline.config.recipe import Config

MINIMAL: dict[str, Any] = {"name": "x", "cohort": {"uri": "c.csv"}, "tasks": [{"name": "t", "column": "label"}]}


def _changed(**sections: Any) -> Config:
    return Config.model_validate({**MINIMAL, **sections})


def test_execution_fields_do_not_enter_fingerprints() -> None:
    plain = TilingConfig()
    assert plain.fingerprint() == TilingConfig(cpus=4, max_bad_slides=7).fingerprint()
    base = fingerprint(_changed().recipe())
    assert fingerprint(_changed(train={"threads": 2}).recipe()) == base
    execution = {
        "storage": {"root": "elsewhere"},
        "tracking": {"uri": "http://x"},
        "cluster": {"gpus_per_worker": 1, "cpus_per_worker": 1},
    }
    execution["train"] = {"source": "stream"}
    for same in ({section: fields} for section, fields in execution.items()):
        assert fingerprint(_changed(**same).recipe()) == base


def test_streaming_is_the_store_without_shared_slides() -> None:
    """Only where several workers would share slides of a store does the source decide who trains on what."""

    def recipe(source: str, workers: object, mode: str = "exact", **train: object) -> str:
        sections = {"train": {"source": source, **train}, "model": {"select": {"mode": mode}}}
        return fingerprint(_changed(cluster={"workers": workers}, **sections).recipe())

    assert recipe("stream", 1) == recipe("store", 1)
    assert recipe("stream", 2, "window") == recipe("store", 2, "window")
    for workers in (2, [2, 2]):
        assert recipe("stream", workers) != recipe("store", workers)
        assert recipe("stream", workers) == recipe("store", workers, shard_above=None)


def test_winners_that_serve_several_visits_do_not_go_with_context() -> None:
    with pytest.raises(
        ValidationError, match=r"reselect_every=2 does not read .* set reselect_every=1 or context: none"
    ):
        _changed(train={"reselect_every": 2}, model={"select": {"context": "all"}})


def test_a_setting_that_is_new_leaves_the_recipes_of_before_as_they_were() -> None:
    for name in ("threads", "reselect_every"):
        assert name not in _changed().recipe()["train"]
        assert _changed(train={name: 3}).recipe()["train"][name] == 3
    assert not {"context", "rank"} & set(_changed().recipe()["model"]["select"])
    assert _changed(model={"select": {"rank": "heads"}}).recipe()["model"]["select"]["rank"] == "heads"


def test_trainings_of_the_last_release_keep_their_names() -> None:
    """Fingerprints that its code gave. With all patches as context it drew those that teach in exact mode alone."""

    def training(**select: object) -> str:
        return fingerprint(_changed(model={"select": select}).recipe())

    plain, exact, window = "13353530b1fc7977", "d1c2fb4aa3487d81", "9cd38869fb4acb1a"
    assert training() == plain
    assert training(context="all", learn_from="drawn") == exact
    assert training(context="all", mode="window") == window
    kept = {"train": {"freeze_encoder": True}, "model": {"select": {"context": "all"}}}
    assert _changed(**kept).recipe()["model"]["select"]["context_rule"] == 2
    best, heads = training(context="all"), training(context="all", mode="window", rank="heads")
    assert len({plain, exact, window, best, heads}) == 5


@pytest.mark.parametrize(
    "section",
    [
        {"seed": 1},
        {"train": {"lr": 1e-4}},
        {"train": {"threads": 1}},
        {"model": {"select": {"memory": 3}}},
        {"cluster": {"workers": 2}},
        {"cluster": {"workers": [1, 1]}},
    ],
)
def test_what_determines_the_model_enters_its_fingerprint(section: dict[str, Any]) -> None:
    assert fingerprint(_changed(**section).recipe()) != fingerprint(_changed().recipe())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"tasks": [{"name": "t", "column": "a"}, {"name": "t", "column": "b"}]}, "names must differ"),
        (
            {"cluster": {"workers": [1, 4]}, "train": {"source": "stream"}},
            r"cluster.workers=\[1, 4\] takes every CPU .* set cluster.workers to one number, or train.source=store",
        ),
        ({"cluster": {"start_timeout_s": float("nan")}}, "greater than 0|finite"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 20_240_101_123_000}, "less than 2147483648"),
        ({"cohort": {"uri": "c.csv", "demo": {"seed": -1}}}, "greater than or equal to 0"),
        ({"tracking": {"model": "team/model"}}, "tracking.model"),
        ({"cohort": {"uri": "c", "bag": "patient"}, "train": {"source": "stream"}}, "set train.source=store"),
        ({"cohort": {"uri": "c", "bag": "patient"}, "train": {"folds": 3}}, "folds score slide by slide"),
        (
            {"model": {"encoder": {"name": "features", "features": 9}}},
            "stored features cannot be flipped or turned; set train.augment=false",
        ),
        (
            {"tasks": [{"name": "t", "column": "a", "kind": "regression"}], "train": {"sampling": "balanced"}},
            "train.sampling: balanced needs classes, and the first task, t, is of kind regression",
        ),
        (
            {"model": {"encoder": {"channels": 1}, "mean": [0.5], "std": [1]}},
            "model.encoder.channels=1, but patches of slides are RGB; set model.encoder.channels=3",
        ),
        (
            {
                "cohort": {"uri": "c.csv", "megapixel_mnist": {"folder": "digits"}},
                "tiling": {"mpp": None, "tissue": "none", "patch_px": 50},
                "train": {"augment": False},
            },
            "model.encoder.channels=3, but digits are grey; set model.encoder.channels=1",
        ),
        (
            {"model": {"select": {"mode": "random", "context": "all"}}},
            "all does not go with select.mode: random .random looks at no others.; set context: none",
        ),
        (
            {"model": {"select": {"mode": "every", "context": "all"}, "aggregator": {"pool": "gated"}}},
            "every keeps all patches already",
        ),
        (
            {"model": {"select": {"context": "all"}, "aggregator": {"pool": "mean"}}},
            "aggregator.pool: mean has no attention that could select",
        ),
        (
            {"model": {"select": {"mode": "window", "context": "all", "learn_from": "drawn"}}},
            "drawn, .* does not go with select.mode: window and rank: mean; set mode: exact and rank: mean, or",
        ),
        (
            {"model": {"select": {"rank": "heads", "context": "all", "learn_from": "drawn"}}},
            "drawn, .* does not go with select.mode: exact and rank: heads",
        ),
    ],
)
def test_impossible_combinations_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _changed(**section)


@pytest.mark.parametrize(("workers", "fewest"), [(3, 3), ([1, 4], 1), ([2, 2], 2)])
def test_workers_are_a_number_or_a_range(workers: object, fewest: int) -> None:
    config = _changed(cluster={"workers": workers})
    assert config.cluster.fewest_workers == fewest
    assert config.recipe()["workers"] == (tuple(workers) if isinstance(workers, list) else workers)
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("workers", [0, True, "2", 1.5, None, [4, 1], [0, 2], [2], [1, 2, 3], ["1", "2"]])
def test_other_workers_are_refused(workers: object) -> None:
    with pytest.raises(ValueError, match=r"cluster.workers\n.*must be a number from 1, or \[least, most\]"):
        _changed(cluster={"workers": workers})


def _tasks(*tasks: dict[str, Any]) -> Config:
    return _changed(tasks=[{"column": task["name"], **task} for task in tasks])


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (
            [{"name": "a", "classes": ["0", "x_1"]}, {"name": "a_x", "classes": ["0", "1"]}],
            "tasks: the predictions would have the column a_x_1 twice: of output x_1 of task a, and output 1 of task "
            "a_x; rename",
        ),
        ([{"name": "a", "classes": ["no", "label"]}], "column a_label twice: of the label of task a, and output label"),
        ([{"name": "a", "classes": ["no", "predicted"]}], "column a_predicted twice: of the prediction of task a, and"),
        ([{"name": "slide", "classes": ["no", "id"]}], "column slide_id twice: of the slide itself, and output id"),
        ([{"name": "n", "classes": ["patches", "bad_tiles"]}], "n_patches twice.*n_bad_tiles twice"),
        ([{"name": "patient", "classes": ["id", "no"]}], "column patient_id twice"),
        ([{"name": "t", "kind": "survival", "event_column": "e", "bins": [6, 6.0000001]}], "column t_6 twice"),
        ([{"name": "a"}, {"name": "low"}], "test_auc_low.*rename the task low"),
        ([{"name": "high"}, {"name": "a"}], "rename the task high"),
    ],
)
def test_tasks_whose_columns_or_metrics_would_be_named_alike_are_refused(
    tasks: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        _tasks(*tasks)


def test_names_that_only_look_alike_are_fine() -> None:
    _tasks({"name": "a", "classes": ["0", "1"]}, {"name": "a_0", "classes": ["0", "1"]}, {"name": "A"})
    _tasks({"name": "low"})
