from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StageError
from pipeline.release.scoring import Scored, Unscorable, own_config, score, test_sources, try_score
from pipeline.segmentation.network import read_network
from pipeline.tracking.registry import RegisteredVersion
from pipeline.tracking.tracker import Tracker, open_tracking
from pipeline.workflow.register import enter
from tests.pipeline.release.space import Study, small_study
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.tracking.test_registry import features_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.slow,  # 10 s: models are registered, and tasks of Ray load torch
]


@pytest.fixture(scope="module")
def study(ray_session: None, mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("scoring")
    tracker: Tracker = open_tracking(mlflow_uri, "scoring", str(folder / "artifacts"))
    return small_study(folder, tracker, {"train": 2, "test": 5})


def _entered(study: Study, seed: int, **changes: object) -> RegisteredVersion:
    space = study.space(seed, **changes)
    with study.tracker.run("register") as run_id:
        return enter(space, run_id, {"train_fingerprint": f"train{seed}"}, {}, "")


def test_a_model_is_scored_as_the_registry_has_it(study: Study) -> None:
    version = _entered(study, 1)
    slides = study.cohort.subset("test")
    own = own_config(study.tracker, version.uri, study.config)
    found = score(study.tracker, version, own, test_sources(own, slides, study.keys))
    predicted = found.predictions(["s"])
    rows = np.array(predicted.values["tumour"])
    assert rows.shape == (5, 2)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    table = found.evaluation.predictions
    np.testing.assert_allclose(rows[:, 1], table["tumour_yes"].to_numpy())
    assert (predicted.version, predicted.train, predicted.seen) == (version.version, "train1", ("s",))
    assert 0 < predicted.seconds < 60
    assert 0.05 < predicted.memory_gib < 20
    assert version.uri in found.page(study.cohort, {})


def test_a_champion_of_another_tiling_has_the_same_slides_tiled_as_it_needs(study: Study) -> None:
    coarse = {**study.config.tiling.model_dump(), "patch_px": 48}
    version = _entered(study, 2, tiling=coarse)
    own = own_config(study.tracker, version.uri, study.config)
    assert own.tiling.patch_px == 48
    sources = test_sources(own, study.cohort.subset("test"), study.keys)
    assert [slide.slide_id for slide, _ in sources] == [f"test{n}" for n in range(5)]
    sizes = {source.n_patches for _, source in sources}
    assert sizes != {source.n_patches for _, source in test_sources(study.config, study.cohort.slides, study.keys)}
    found = try_score(study.tracker, version, study.config, study.cohort.subset("test"), study.keys)
    assert isinstance(found, Scored)


def test_a_champion_on_features_brings_the_network_that_makes_them(study: Study, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    plain = features_config(weights).model_dump()
    version = _entered(study, 6, **{name: plain[name] for name in ("embed", "model", "train")})
    weights.unlink()
    found = try_score(study.tracker, version, study.config, study.cohort.subset("test"), study.keys)
    assert isinstance(found, Scored), found
    assert found.config.embed is not None
    assert len(list(Path(str(study.config.storage.features)).glob("*/*/slide.json"))) == 5


def test_a_champion_brings_the_network_that_finds_its_tissue(study: Study, tmp_path: Path) -> None:
    network = scripted(Toy(), tmp_path / "toy.pt")
    version = _entered(study, 7, tiling=small_tiling(network))
    network.unlink()
    own = own_config(study.tracker, version.uri, study.config).tiling.tissue_model
    assert own is not None
    assert Path(own.uri).parent == Path(study.config.storage.root) / "release" / "weights"  # which every node reaches
    assert read_network(own)[0] == "torchscript"


def test_a_champion_that_predicts_something_else_cannot_be_compared(study: Study) -> None:
    tasks = [{"name": "tumour", "column": "label", "classes": ["no", "maybe"]}]
    version = _entered(study, 3, tasks=tasks)
    with pytest.raises(StageError, match="other tasks, classes, bins or scales cannot be compared"):
        own_config(study.tracker, version.uri, study.config)
    found = try_score(study.tracker, version, study.config, study.cohort.subset("test"), study.keys)
    assert isinstance(found, Unscorable)
    assert "it predicts ['tumour']" in found.why
    weighted = {**study.config.tasks[0].model_dump(), "class_weights": "balanced"}
    assert own_config(study.tracker, _entered(study, 4, tasks=[weighted]).uri, study.config).tasks == study.config.tasks


def test_a_champion_whose_files_are_gone_cannot_be_scored(study: Study) -> None:
    version = _entered(study, 5)
    source = study.tracker.client.get_model_version_download_uri(version.name, version.version)
    for path in Path(source.removeprefix("file://")).rglob("weights.safetensors"):
        path.unlink()
    found = try_score(study.tracker, version, study.config, study.cohort.subset("test"), study.keys)
    assert isinstance(found, Unscorable)
    assert "weights.safetensors" in found.why
