from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.jobs.pods import image_of, label_name, pod, ray_container, variables
from tests.pipeline.small import small_config


def test_an_image_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"deploy\.image: is required"):
        image_of(small_config())


def test_names_are_made_fit_or_refused() -> None:
    assert label_name("My_Study.2") == "my-study-2"
    with pytest.raises(ConfigError, match="has 64 characters, and 63 are allowed"):
        label_name("a" * 64)


def test_variables_come_by_name_and_secrets_whole() -> None:
    config = small_config(deploy={"image": "i:1", "env": ["AWS_ENDPOINT_URL"], "secrets": ["a", "b"]})
    found = {one["name"]: one for one in variables(config)}
    assert found["AWS_ENDPOINT_URL"]["valueFrom"]["configMapKeyRef"] == {"name": "ips-env", "key": "AWS_ENDPOINT_URL"}
    assert found["IPS_IMAGE"]["value"] == "i:1"
    made, volumes = ray_container(config, "w", cpus=1.5, memory_gib=8, gpus=0.5)
    assert made["envFrom"] == [{"secretRef": {"name": "a"}}, {"secretRef": {"name": "b"}}]
    assert made["resources"]["limits"] == {"memory": "8192Mi", "nvidia.com/gpu": "1"}  # Kubernetes has whole ones
    assert volumes[0] == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2048Mi"}}
    spec = pod(config, [made])
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    assert made["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
