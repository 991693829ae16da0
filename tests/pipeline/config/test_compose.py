from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config.compose import find_config_dir, load_config
from pipeline.errors import ConfigError

CONF = Path(__file__).resolve().parents[3] / "conf"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
DIGITS = "cohort.megapixel_mnist.folder=mnist"
NEEDED = {
    "camelyon16": ["embed.encoder.weights=w.safetensors"],
    "megapixel_mnist": [DIGITS],
    "cohort=megapixel_mnist": [DIGITS, "model=megapixel_mnist", "tiling=image", "train.augment=false"],
    "model=megapixel_mnist": [DIGITS, "cohort=megapixel_mnist", "tiling=image", "train.augment=false"],
    "model=features": ["model.encoder.features=2048", "embed.encoder.name=resnet50", "train.augment=false"],
}
"""What the user must give, and what else a group's file asks for."""


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_is_valid(name: str) -> None:
    assert load_config(name, ["cohort.uri=c.csv", *NEEDED.get(name, [])], CONF).name == name


@pytest.mark.parametrize(
    "choice", [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name != "deploy"]
)
def test_every_group_file_is_valid(choice: str) -> None:
    load_config("default", ["cohort.uri=c.csv", choice, *NEEDED.get(choice, [])], CONF)


def test_all_problems_come_at_once_with_path_and_remedy() -> None:
    wrong = ["train.epohcs=3", "train.lr=fast", "model=huge", "tiling.overlap_px=999", "nonsense", "cluster.workers=0"]
    with pytest.raises(ConfigError) as caught:
        load_config("default", wrong, CONF)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    for part in (
        "train.epohcs: unknown key; did you mean epochs?",
        "train.lr: ",
        "'fast'",
        "model: no group file 'huge'; choose one of ",
        "overlap_px=999 must be smaller than patch_px=256",
        "'nonsense': an override is written key=value",
        "cluster.workers: ",
        "cohort.uri: is required; give cohort.uri=VALUE",
    ):
        assert part in text, text


def test_values_keep_equals_commas_spaces_and_colons() -> None:
    uri = "s3://b/a=1,b 2/c: d.csv"
    assert load_config("default", [f"cohort.uri={uri}"], CONF).cohort.uri == uri


def test_a_number_sign_is_no_comment() -> None:
    given = ["cohort.uri=/data/run #3/c.csv", "storage.root='/r #4'", "train.lr=0.001"]
    config = load_config("default", given, CONF)
    assert config.cohort.uri == "/data/run #3/c.csv"
    assert config.storage.root == "/r #4"
    assert config.train.lr == 1e-3


@pytest.mark.parametrize(
    "text", ["2024", "2026-11-28", "007", "1_000", "true", "no", "12:30:45", "0x1f", "2e3", "'2024'"]
)
def test_what_yaml_makes_of_a_text_is_the_text_that_was_typed(text: str) -> None:
    config = load_config("default", ["cohort.uri=c.csv", f"tracking.experiment={text}", "cluster.workers=3"], CONF)
    assert config.tracking.experiment == text.strip("'")
    if ":" not in text:
        config = load_config("default", ["cohort.uri=c.csv", f"name={text}"], CONF)
        assert (config.name, Path(config.storage.root).name) == (text.strip("'"), text.strip("'"))


def test_a_text_within_another_value_or_a_file_must_be_quoted(tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "mine.yaml").write_text(
        (CONF / "default.yaml").read_text().replace("name: default", "name: 2024", 1)
    )
    with pytest.raises(ConfigError) as caught:
        load_config("mine", ["cohort.uri=null", "tasks=[{name: t, column: no}]"], tmp_path / "conf")
    assert caught.value.problems == (
        'name: must be text, and YAML reads it as the number 2024; put it into quotes, as in name: "TEXT"',
        "cohort.uri: must be text; give cohort.uri=TEXT",
        "tasks.0.column: must be text, and YAML reads it as the truth value False; put it into quotes, as in "
        'column: "TEXT"',
    )


@pytest.mark.parametrize(
    ("typed", "classes"),
    [
        ("[0,1]", ("0", "1")),
        ("[no,yes]", ("false", "true")),
        ("[true, false]", ("true", "false")),
        ("[0.5, 2]", ("0.5", "2")),
        ("[2026-11-28, b]", ("2026-11-28", "b")),
        ('["no","yes"]', ("no", "yes")),
    ],
)
def test_classes_as_yaml_reads_them(tmp_path: Path, typed: str, classes: tuple[str, ...]) -> None:
    config = load_config("default", ["cohort.uri=c.csv", f"tasks.0.classes={typed}"], CONF)
    assert config.tasks[0].classes == classes
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "mine.yaml").write_text((CONF / "default.yaml").read_text() + f"    classes: {typed}\n")
    assert load_config("mine", ["cohort.uri=c.csv"], tmp_path / "conf").tasks[0].classes == classes


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["tasks.0.kind=multiclass", "tasks.0.classes=[yes,no,unknown]"],
            "tasks.0.classes: YAML reads yes, no, on, off, true and false as truth values; put such classes into "
            'quotes, as in ["yes", "no"]',
        ),
        (["tasks.0.classes=0,1"], "tasks.0.classes: must be a list, as in tasks.0.classes=[A,B] (got '0,1')"),
        (
            ["tasks.0.kind=multi"],
            "tasks.0.kind: Input should be 'binary', 'multiclass', 'multilabel', 'regression' or ",
        ),
        (["tasks=[]"], "tasks: Tuple should have at least 1 item after validation, not 0"),
    ],
)
def test_a_task_that_is_wrong_is_one_problem(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("default", ["cohort.uri=c.csv", *overrides], CONF)
    (only,) = caught.value.problems
    assert only.startswith(problem)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["storage.root=/a?b"], "storage.root: '/a?b' holds '?', which MLflow reads as another name for its file"),
        (
            ["storage.root=/a%41b"],
            "storage.root: '/a%41b' holds '%41', which MLflow reads as another name for its file",
        ),
        (
            ["storage.root=s3://b/a?c", "tracking.uri=http://h"],
            "storage.root: 's3://b/a?c' holds '?', at which MLflow ends",
        ),
        (["storage.root=s3://b/a#c"], "storage.root: 's3://b/a#c' holds '#', at which MLflow ends the place"),
    ],
)
def test_a_root_beside_which_mlflow_would_write_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("default", ["cohort.uri=c.csv", *overrides], CONF)
    (only,) = caught.value.problems
    assert only.startswith(problem)
    assert "choose a place without it" in only


def test_a_working_directory_beside_which_mlflow_would_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    with pytest.raises(ConfigError, match=r"tracking.uri: is required, for the working directory '.*a\?b' holds '\?'"):
        load_config("default", ["cohort.uri=c.csv", "storage.root=s3://b/c"], CONF)
    load_config("default", ["cohort.uri=c.csv", "storage.root=s3://b/c", "tracking.uri=http://h"], CONF)


def test_values_are_typed() -> None:
    config = load_config(
        "default",
        ["cohort.uri=c.csv", "train.lr=1e-3", "tiling.mpp=null", "train.augment=false", "model.mean=[0.1, 0.2, 0.3]"],
        CONF,
    )
    assert config.train.lr == 1e-3
    assert config.tiling.mpp is None
    assert config.train.augment is False
    assert config.model.mean == (0.1, 0.2, 0.3)


def test_groups_are_chosen_by_name() -> None:
    assert load_config("default", ["cohort.uri=c", "model=resnet18_small"], CONF).model.encoder.stages == 2


def test_paths_become_absolute_and_defaults_are_derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", [], CONF)
    root = str(tmp_path / "runs" / "demo")
    assert config.storage.root == root
    assert config.storage.patches == f"{root}/patches"
    assert config.cohort.uri == f"{root}/cohort/cohort.csv"
    assert config.tracking.uri == f"sqlite:///{root}/mlflow.db"
    assert config.tracking.model == "demo"


def test_unknown_config_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"it has: .*default.*demo"):
        load_config("dmo", [], CONF)


def test_conf_is_found_in_the_working_directory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config_dir() == CONF
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "default.yaml").write_text("name: mine\n")
    assert find_config_dir() == tmp_path / "conf"
    with pytest.raises(ConfigError, match="no such folder"):
        find_config_dir(tmp_path / "absent")


def test_a_relative_root_inside_a_ray_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"storage.root: 'runs/demo' is relative inside a Ray job; .*absolute path"):
        load_config("demo", [], CONF)
    with pytest.raises(ConfigError, match="tracking.uri: is required in a Ray job"):
        load_config("demo", ["storage.root=s3://bucket/demo"], CONF)
    for field in ("storage.patches", "storage.features"):
        with pytest.raises(ConfigError, match=rf"{field}: 'shared' is relative inside a Ray job"):
            load_config("demo", ["storage.root=/data/demo", f"{field}=shared"], CONF)
    with pytest.raises(ConfigError, match=r"tracking.uri: 'sqlite:///mlflow.db' is relative inside a Ray job"):
        load_config("demo", ["storage.root=/data/demo", "tracking.uri=sqlite:///mlflow.db"], CONF)
    load_config("demo", ["storage.root=/data/demo", "tracking.uri=sqlite:////data/mlflow.db"], CONF)
    load_config("demo", ["storage.root=/data/demo"], CONF)


def test_broken_yaml_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match=r"default"):
        load_config("default", [], tmp_path)


def test_the_digits_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = load_config("megapixel_mnist", [DIGITS], CONF).cohort.megapixel_mnist
    assert images is not None
    assert images.folder == f"{tmp_path}/mnist"


def test_megapixel_mnist_refuses_what_would_change_digits() -> None:
    for override, remedy in (
        ("train.augment=true", "set train.augment=false"),
        ("tiling.tissue=otsu", "set tiling=image"),
        ("tiling.patch_px=1501", "larger than an image"),
        ("cohort.demo={}", "two cohorts"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            load_config("megapixel_mnist", [DIGITS, override], CONF)


def test_every_place_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["cohort.uri=c.csv", "tiling.coords=h5", "embed.encoder.name=resnet18", "embed.encoder.weights=w.pth"]
    config = load_config("default", given, CONF)
    assert config.embed is not None
    assert config.embed.encoder.weights == str(tmp_path / "w.pth")
    assert config.tiling.coords == str(tmp_path / "h5")
    assert config.storage.features == str(tmp_path / "runs" / "default" / "features")


def test_a_root_where_mlflow_keeps_nothing_is_refused(tmp_path: Path) -> None:
    stores = ["storage.patches=az://c/patches", "cohort.uri=az://c/cohort.csv"]
    config = load_config("default", [*stores, f"storage.root={tmp_path}"])
    assert config.storage.patches == "az://c/patches"
    with pytest.raises(ConfigError, match=r"storage\.root: 'az://c/root' would hold MLflow's artifacts"):
        load_config("default", [*stores, "storage.root=az://c/root", f"tracking.uri=sqlite:///{tmp_path}/m.db"])
