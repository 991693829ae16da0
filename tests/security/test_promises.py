"""What SECURITY.md promises beside secrets: what is read executes nothing, and names lead nowhere else.

That pages escape what a cohort says is tested beside the pages, that a served model keeps to its roots beside serving.
"""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cohort.table import read_cohort
from pipeline.config.compose import load_config
from pipeline.config.model import EncoderConfig
from pipeline.errors import CohortError, ConfigError, StageError
from pipeline.inference.prediction import load_model
from pipeline.model.build import build_encoder, build_model, build_optimizer
from pipeline.model.checkpoint import STATE, load_checkpoint
from pipeline.model.folder import CONFIG, WEIGHTS
from pipeline.predictions.run import predict
from tests.pipeline.small import small_config, write_model, write_slide


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.sign),)


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    """What the payload makes."""
    return tmp_path / "executed"


def test_the_payload_works(sign: Path) -> None:
    pickle.loads(pickle.dumps(Payload(sign)))
    assert sign.is_dir()


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_pretrained_weights_execute_nothing(write: str, sign: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if write == "torch":
        torch.save({"conv1.weight": Payload(sign)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(ConfigError, match="weights"):
        build_encoder(EncoderConfig(name="resnet18", weights=str(path)))
    assert not sign.exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_models_folder_executes_nothing(name: str, sign: Path, tmp_path: Path) -> None:
    write_model(tmp_path, small_config())
    (tmp_path / name).write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(StageError, match=name):
        load_model(tmp_path)
    assert not sign.exists()


def test_a_training_state_executes_nothing(sign: Path, tmp_path: Path) -> None:
    config = small_config()
    write_model(tmp_path, config)
    torch.save({"optimizer": Payload(sign), "progress": Payload(sign)}, tmp_path / STATE)
    model = build_model(config)
    with suppress(Exception):  # how it is refused is tested beside it
        load_checkpoint(tmp_path, model, build_optimizer(model, config.train), "plan")
        pytest.fail("a forged state was taken")
    assert not sign.exists()
    assert load_file(tmp_path / WEIGHTS)


TAGS = ("!!python/object/apply:os.mkdir [{sign}]", "!!python/object/new:os.mkdir [{sign}]", "!!python/name:os.mkdir")


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_executes_nothing(tag: str, sign: Path, tmp_path: Path) -> None:
    text = tag.format(sign=sign)
    (tmp_path / "demo.yaml").write_text(f"name: {text}\n")
    with pytest.raises(ConfigError):
        load_config("demo", config_dir=tmp_path)
    config = load_config("demo", [f"tracking.experiment={text}"])
    assert config.tracking.experiment == text  # data, of a strange spelling
    assert not sign.exists()


@pytest.mark.parametrize(
    "text", ["${oc.create:{_target_: os.mkdir, _args_: [SIGN]}}", "{_target_: os.mkdir, path: SIGN}"]
)
def test_what_hydra_would_instantiate_is_data(text: str, sign: Path) -> None:
    with pytest.raises(ConfigError):
        load_config("demo", [f"tracking.experiment={text.replace('SIGN', str(sign))}"])
    assert not sign.exists()


def test_a_cohort_executes_nothing(sign: Path, tmp_path: Path) -> None:
    (tmp_path / "cohort.parquet").write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(CohortError):
        read_cohort(str(tmp_path / "cohort.parquet"))
    assert not sign.exists()


@pytest.mark.parametrize("slide_id", ["../../out", "/{root}/absolute", "..", "a/../../b", "~/x", "x\\..\\y"])
def test_ids_lead_nowhere_else(slide_id: str, tmp_path: Path) -> None:
    for name in ("model", "given", "deep/er/out"):
        (tmp_path / name).mkdir(parents=True)
    write_model(tmp_path / "model", small_config())
    write_slide(tmp_path / "given" / "s.png", 3)
    (tmp_path / "given" / "c.csv").write_text(f"slide_id,uri\n{slide_id.format(root=tmp_path)},s.png\n")
    out = tmp_path / "deep" / "er" / "out"
    before = _beside(out, tmp_path)
    said = predict(
        str(tmp_path / "model"), [], str(tmp_path / "given" / "c.csv"), out, tracking_uri="sqlite:///none.db"
    )
    assert said["failed"] == {}
    assert len(list((out / "slides").iterdir())) == 1
    assert _beside(out, tmp_path) == before


def _beside(folder: Path, root: Path) -> set[Path]:
    """All that lies below a root, but not in a folder."""
    return {path for path in root.rglob("*") if folder not in [path, *path.parents]}
