from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.config.compose import load_config
from pipeline.errors import ConfigError

SECRET = "hunter2-hunter2"


def _refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["${oc.env:DB_PASSWORD}", "a${oc.env:DB_PASSWORD}", "${oc.env:DB_PASSWORD,none}", "${oc.env:${name}}"]
)
def test_a_secret_variable_is_not_resolved(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET[:3])  # too short to be told by its value
    said = _refused(f"tracking.experiment={text}", "name=DB_PASSWORD")
    assert "tracking.experiment: " in said
    assert "${oc.env:DB_PASSWORD} would record a secret" in said


def test_the_value_of_a_secret_variable_is_told_however_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    said = _refused(f"tasks=[{{name: a, column: x{SECRET}}}]")
    assert "tasks.0.column: holds the value of the environment variable DB_PASSWORD" in said


def test_a_secret_does_not_show_in_what_is_wrong_with_the_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    (tmp_path / "cohort").mkdir()
    (tmp_path / "demo.yaml").write_text("defaults:\n  - cohort: ${oc.env:DB_PASSWORD}\n")
    with pytest.raises(ConfigError) as caught:
        load_config("demo", config_dir=tmp_path)
    assert SECRET not in str(caught.value)


def test_other_variables_are_resolved_and_the_process_keeps_its_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load_config("demo", ["storage.root=${oc.env:SCRATCH}/runs", "tracking.experiment=${oc.env:NONE_SUCH,e}"])
    assert (config.storage.root, config.tracking.experiment) == ("/scratch/me/runs", "e")
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    assert OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:DB_PASSWORD}"}), resolve=True) == {"a": SECRET}
