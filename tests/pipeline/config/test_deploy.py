from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config.deploy import DeployConfig
from tests.pipeline.small import small_config


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("env", ["AWS_SECRET_ACCESS_KEY"], "credentials by their name"),
        ("env", ["A-B"], "should match pattern"),
        ("namespace", "Not_A_Label", "should match pattern"),
        ("schedule", "0 2 * *", "should match pattern"),
        ("schedule", "TZ=UTC 0 2 * * 1", "."),
        ("image", "https://u:PlantedPa55word@registry/ips", "holds a password or token"),
        ("command", [], "at least 1 item"),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DeployConfig.model_validate({field: value})


def test_a_time_zone_within_the_schedule_is_refused() -> None:
    with pytest.raises(ValidationError, match="set deploy.time_zone"):
        DeployConfig(schedule="CRON_TZ=UTC 2 * * 1")


def test_it_is_no_part_of_the_recipe() -> None:
    assert small_config().recipe() == small_config(deploy={"image": "i:1", "head_cpus": 3}).recipe()
