from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.gate.decision import DECISION
from pipeline.release.history import Act, append
from pipeline.release.promotion import decision_folder
from pipeline.release.standing import status
from pipeline.storage.files import write_bytes
from pipeline.tracking.registry import point
from pipeline.tracking.tracker import open_tracking
from tests.pipeline.small import small_config

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_since_when_and_why_somebody_is_champion(mlflow_uri: str, tmp_path: Path) -> None:
    """Deleted versions and moved aliases stand in `test_promotion`, with what mends them."""
    tracker, name, root = open_tracking(mlflow_uri, "standing", str(tmp_path / "a")), tmp_path.name, str(tmp_path / "r")
    tracker.client.create_registered_model(name)
    for _ in range(3):
        tracker.client.create_model_version(name, str(tmp_path), None)
    config = small_config(storage={"root": root}, tracking={"uri": tracker.uri, "model": name})
    nothing = status(config)
    assert (nothing["champion"], nothing["since"], nothing["agrees"], nothing["wrong"]) == (None, None, True, [])
    point(tracker, name, "champion", "1")
    assert status(config)["champion"] == "1"  # without a decision the registry says it
    first = append(root, Act("promote", name, None, "1", None, None, "1", "d" * 64, ("it is good",), "retrain"), None)
    append(root, Act("hold", name, "1", "1", None, "2", "2", "e" * 64, ("too few",), "retrain"), first)
    found = status(config)
    assert (found["since"], found["why"], found["by"], found["decision"]) == (first.at, ["it is good"], "retrain", None)
    assert found["waits"] == {"version": "2", "why": ["too few"]}
    assert found["wrong"] == ["challenger is nobody in the registry, and 2 by the last decision; `release repair` "
                              "brings it there"]  # fmt: skip
    uri = f"{decision_folder(root, 'd' * 64)}/{DECISION}"
    write_bytes(uri, b"{}")
    assert status(config)["decision"] == uri
