"""Models are looked up once, named by what they are, and kept."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.model.folder import CONFIG, SEEN, TISSUE_NETWORK, WEIGHTS, Seen, at_hand
from pipeline.storage.files import write_json
from pipeline.sweep.models import SweepModel, keep, resolve_models, same_tasks
from pipeline.tracking.registry import promote, register_model
from pipeline.tracking.tracker import open_tracking
from tests.pipeline.small import small_config
from tests.pipeline.sweep.small_sweep import sweep_config, write_model


def _scratch(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_registered_version_brings_its_threshold_and_what_it_has_seen(tmp_path: Path, mlflow_uri: str) -> None:
    folder = write_model(tmp_path / "one", 3)
    seen = Seen(frozenset({"key"}), frozenset({Seen.patient("p1")}))
    write_json(str(folder / SEEN), seen.as_json())
    tracker = open_tracking(mlflow_uri, "swept", str(tmp_path / "artifacts"))
    with tracker.run("register") as run_id:
        version = register_model(
            tracker, "swept", folder, run_id, tags={"val_threshold_tumour": "0.31"}, metrics={}, example_uri="a.svs"
        )
    promote(tracker, "swept", version.version)
    config = sweep_config(tmp_path, mlflow_uri, {"champion": "models:/swept@champion", "gone": "models:/swept/99"})
    (found,), failed = resolve_models(config, _scratch(tmp_path, "a"))
    assert (found.origin, found.thresholds, found.seen) == ("models:/swept/1", {"tumour": 0.31}, seen)
    assert "has versions [1]" in failed["gone"]
    alone = sweep_config(tmp_path, mlflow_uri, {"folder": str(folder)})
    (same,), _ = resolve_models(alone, _scratch(tmp_path, "b"))
    assert same.digest == found.digest  # the same model, wherever it lies
    both = sweep_config(tmp_path, mlflow_uri, {"champion": "models:/swept@champion", "folder": str(folder)})
    with pytest.raises(ConfigError, match="are one model"):
        resolve_models(both, _scratch(tmp_path, "c"))


def test_the_digest_is_of_weights_and_of_what_decides_predictions(tmp_path: Path, mlflow_uri: str) -> None:
    def digest(folder: str, seed: int = 3, **changes: object) -> str:
        config = sweep_config(tmp_path, mlflow_uri, {folder: str(write_model(tmp_path / folder, seed, **changes))})
        (found,), _ = resolve_models(config, _scratch(tmp_path, f"scratch-{folder}"))
        return found.digest

    base = digest("base")
    assert digest("renamed", name="other", train={"lr": 0.5}) == base
    tiling = {"patch_px": 32, "mpp": None, "min_tissue": 0.6, "edge": "drop"}
    assert (
        len({base, digest("seed", 4), digest("batch", train={"score_batch": 8}), digest("tiling", tiling=tiling)}) == 4
    )


def test_kept_models_outlive_their_origin(tmp_path: Path, mlflow_uri: str) -> None:
    folder = write_model(tmp_path / "one", 3)
    config = sweep_config(tmp_path, mlflow_uri, {"one": str(folder)})
    (model,), _ = resolve_models(config, _scratch(tmp_path, "a"))
    kept = keep(model, str(tmp_path / "root"))
    before = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    with ExitStack() as stack:
        local = at_hand(kept, stack)
        assert (local / WEIGHTS).read_bytes() == before
        assert json.loads((local / CONFIG).read_text())["name"] == "small"
    assert keep(model, str(tmp_path / "root")) == kept
    (Path(model.folder) / TISSUE_NETWORK).write_bytes(b"network")  # as the registered version of a checkpoint has it
    assert keep(model, str(tmp_path / "root")) == kept
    assert (Path(kept) / TISSUE_NETWORK).read_bytes() == b"network"


def test_models_that_read_otherwise_are_not_compared() -> None:
    """Patients as one bag, and features that other tools have made beside slides."""

    def model(name: str, **changes: object) -> SweepModel:
        return SweepModel(name, f"models:/{name}/1", name, small_config(**changes), "/folder", 100)

    slides, patients = model("slides"), model("patients", cohort={"uri": "c.csv", "bag": "patient"})
    features = {"encoder": {"name": "features", "features": 9}}
    given = model("given", model=features, train={"augment": False})
    same_tasks([slides, model("others")])
    same_tasks([given])
    with pytest.raises(ConfigError, match="sweep.models.patients: learned from patients of several slides"):
        same_tasks([slides, patients])
    with pytest.raises(ConfigError, match="of slides and given one takes features that other tools have made"):
        same_tasks([slides, given])
