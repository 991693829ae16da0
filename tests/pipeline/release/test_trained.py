from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.cohort.table import Cohort, CohortSlide
from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.errors import ConfigError
from pipeline.model.build import build_model
from pipeline.release.trained import Trained, read_trained, replayed, together, warmed, write_trained
from pipeline.storage.files import write_json
from pipeline.tracking.registry import RegisteredVersion, register_model
from pipeline.tracking.tracker import Tracker, open_tracking
from tests.pipeline.small import small_config, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
]

LEARNED: Mapping[str, list[str]] = {"keys": ["k1"], "patients": ["p1"]}


def test_what_a_model_learned_from_is_recorded_or_read_off_its_training(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert read_trained(root, None) is None
    assert read_trained(root, "abc") is None
    facts = {"learned": LEARNED, "items": {"train": {f"{slide:016x}": ["0" * 8, "1" * 8] for slide in (2, 1)}}}
    write_json(f"{root}/stages/train-abc.json", {"facts": facts})
    assert read_trained(root, "abc") == Trained(LEARNED, [f"{slide:016x}" for slide in (1, 2)], None)
    write_json(f"{root}/stages/train-old.json", {"facts": {}})
    assert read_trained(root, "old") is None
    whole = Trained(LEARNED, ["d1"], {"d1": ["p", "v", "g", "l"]})
    write_trained(root, "abc", whole)
    assert read_trained(root, "abc") == whole


def test_a_model_that_goes_on_from_another_has_learned_from_both() -> None:
    assert together(LEARNED, {"keys": ["k0", "k1"], "patients": []}) == {"keys": ["k0", "k1"], "patients": ["p1"]}


def test_a_share_of_what_was_learned_from_is_trained_on_again() -> None:
    slides = [CohortSlide(f"s{n}", f"/s{n}", f"p{n}", "train" if n % 5 else "test", None, {}, {}) for n in range(400)]
    cohort = Cohort("c", tuple(slides))
    old = Trained(LEARNED, [fingerprint(f"s{n}") for n in range(300)], None)
    assert replayed(old, 1.0, 0)(cohort) == cohort
    assert replayed(None, 0.0, 0)(cohort) == cohort
    none = replayed(old, 0.0, 0)(cohort)
    assert {s.slide_id for s in none.subset("train")} == {f"s{n}" for n in range(300, 400) if n % 5}
    assert none.subset("test") == cohort.subset("test")
    some = replayed(old, 0.25, 0)(cohort)
    assert 80 + 35 < len(some.subset("train")) < 80 + 85  # 60 of 240 expected
    assert replayed(old, 0.25, 0)(cohort) == some != replayed(old, 0.25, 1)(cohort)
    assert {s.slide_id for s in some.subset("train")} <= {
        s.slide_id for s in replayed(old, 0.5, 0)(cohort).subset("train")
    }


@pytest.fixture(scope="module")
def champion(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tracker, RegisteredVersion]:
    folder = tmp_path_factory.mktemp("warm")
    tracker = open_tracking(mlflow_uri, "warm", str(folder / "artifacts"))
    write_model(folder, small_config())
    with tracker.run("register") as run_id:
        version = register_model(tracker, "warm", folder, run_id, tags={}, metrics={}, example_uri="/a.svs")
    return tracker, version


def test_training_goes_on_from_the_champions_weights(
    champion: tuple[Tracker, RegisteredVersion], tmp_path: Path
) -> None:
    tracker, version = champion
    config = small_config(storage={"root": str(tmp_path)}, retrain={"start": "warm", "epochs": 7, "lr": 1e-4})
    warm = warmed(config, tracker, version)
    assert (warm.train.epochs, warm.train.lr, warm.train.warmup_epochs) == (7, 1e-4, config.train.warmup_epochs)
    assert warm.recipe()["train"]["epochs"] == 7
    assert "begins_with" not in warm.recipe()["train"]
    torch.manual_seed(3)
    expected = build_model(small_config())
    torch.manual_seed(99)
    for name, value in build_model(warm).state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=0)
    place = Path(str(warm.train.begins_with))
    before = place.stat().st_mtime_ns
    assert warmed(config, tracker, version).train.begins_with == str(place)
    assert place.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retrain": {"start": "warm", "epochs": 1}}, "retrain: with its schedule, train is wrong: .*warmup_epochs=2"),
        ({"model": {"encoder": {"stages": 4}}}, "train.begins_with: .* not the weights of a model of this shape"),
    ],
)
def test_a_champion_that_cannot_be_gone_on_from_is_refused_before_training(
    changes: dict[str, object], said: str, champion: tuple[Tracker, RegisteredVersion], tmp_path: Path
) -> None:
    config = Config.model_validate({**small_config(storage={"root": str(tmp_path)}).model_dump(), **changes})
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        warmed(config, *champion)
