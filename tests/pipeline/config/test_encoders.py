from __future__ import annotations

import re

import pytest
import torch

from pipeline.config.compose import load_config
from pipeline.config.encoders import PRESETS
from pipeline.config.model import ModelConfig
from pipeline.config.recipe import Config
from pipeline.model.build import preset_network
from tests.pipeline.small import small_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_network_is_as_wide_and_as_large_as_published(name: str) -> None:
    with torch.device("meta"):
        network = preset_network(name)
    assert network.dim == PRESETS[name].width
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == int(PRESETS[name].parameters)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", PRESETS[name].repository)


def config(name: str = "h-optimus-0", **changes: object) -> Config:
    plain = {"embed": {"encoder": {"name": name}}, "tiling": {}}
    return small_config(**{**plain, **changes})


def test_tiling_and_statistics_follow_the_preset_where_they_are_not_given() -> None:
    for name, preset in PRESETS.items():
        found = config(name)
        assert (found.tiling.patch_px, found.tiling.mpp) == (preset.patch_px, preset.mpp)
        assert found.embed is not None
        assert (found.embed.mean, found.embed.std) == preset.statistics
        assert found.departures() == []
    own = config("virchow2", tiling={"patch_px": 256})
    assert (own.tiling.patch_px, own.tiling.mpp) == (256, 0.5)
    assert config("resnet50").tiling.patch_px == 256
    assert ModelConfig.model_validate({"encoder": {"name": "h-optimus-1"}}).mean == PRESETS["h-optimus-1"].statistics[0]


def test_the_command_line_s_defaults_do_not_stand_in_a_preset_s_way() -> None:
    found = load_config("default", ["cohort.uri=x", "embed.encoder.name=gigapath"])
    assert (found.tiling.patch_px, found.departures()) == (224, [])
    assert load_config("default", ["cohort.uri=x"]).tiling.patch_px == 256


def test_departures_are_told() -> None:
    embed = {"encoder": {"name": "h-optimus-0"}, "mean": [0.5, 0.5, 0.5]}
    told = config(tiling={"patch_px": 256, "mpp": 0.25}, embed=embed).departures()
    assert [text.partition(", ")[0] for text in told] == [
        "embed.encoder.name=h-optimus-0: tiling.patch_px=256",
        "embed.encoder.name=h-optimus-0: tiling.mpp=0.25",
        "embed.encoder.name=h-optimus-0: mean=[0.5",
    ]
    assert config(tiling={"mpp": 0.51}).departures() == []
    pixels = small_config(model={"encoder": {"name": "uni"}}, tiling={"patch_px": 224, "mpp": 0.5})
    assert pixels.departures() == ["model.encoder.name=uni: tiling.patch_px=224, and it takes 256 (resized to 224)"]
    assert small_config().departures() == []
