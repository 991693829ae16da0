from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.compose import load_config
from pipeline.errors import ConfigError
from pipeline.jobs.manifests import KINDS, documents, render
from tests.pipeline.small import small_config

DEPLOY = Path(__file__).resolve().parents[3] / "conf" / "deploy"
CHOSEN = (
    "--config",
    "camelyon16",
    "cluster=gpu",
    "storage.root=s3://ips/camelyon16",
    "tracking.uri=http://mlflow:5000",
    "deploy.image=registry.example.org/ips:0.1.0",
    "deploy.address=http://camelyon16-head-svc:8265",
    "deploy.env=[AWS_ENDPOINT_URL,AWS_DEFAULT_REGION]",
)
"""What the files of conf/deploy are made of."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_conf_deploy_are_what_is_rendered(kind: str) -> None:
    config = load_config(CHOSEN[1], CHOSEN[2:], in_job=True)
    assert (DEPLOY / f"{kind}.yaml").read_text() == render(kind, config, CHOSEN), "render it anew"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rendered_is_what_is_meant(kind: str) -> None:
    config = small_config(deploy={"image": "i:1", "command": ["release", "retrain"]})
    text = render(kind, config, ["--config", "x y"])
    assert text.startswith(f"# python -m pipeline manifest {kind} --config 'x y'\n")
    assert list(yaml.safe_load_all(text)) == documents(kind, config, ["release", "retrain", "--config", "x y"])
    assert "&id" not in text  # each value stands where it counts


def test_the_secrets_that_it_needs_are_named() -> None:
    config = small_config(deploy={"image": "i:1", "secrets": ["s3-keys"], "env": ["AWS_ENDPOINT_URL"]})
    text = render("rayjob", config, [])
    assert "# Needs the secrets s3-keys" in text
    assert "# Needs the ConfigMap ips-env with AWS_ENDPOINT_URL." in text
    assert "RAY_AUTH_TOKEN" in render("compose", config, []).splitlines()[1]


def test_a_pod_without_a_cluster_is_not_told_to_join_one() -> None:
    config = small_config(deploy={"image": "i:1"}, cluster={"address": "auto"})
    with pytest.raises(ConfigError, match=r"cluster\.address=auto needs a cluster, and the pod has none"):
        documents("cronjob", config, [])


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no kind 'helm'; choose one of cronjob, rayjob"):
        documents("helm", small_config(), [])
