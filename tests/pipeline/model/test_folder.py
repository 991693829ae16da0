from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ips.bag import TensorBag
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.inference.prediction import BagPrediction, load_model, predict_bag
from pipeline.model.build import build_model
from pipeline.model.folder import (
    EMBED_WEIGHTS,
    MEMBERS,
    SEEN,
    TISSUE_NETWORK,
    WEIGHTS,
    Seen,
    at_hand,
    check_one_recipe,
    keep_any,
    load_weights,
    model_digest,
    model_folders,
    read_config,
    read_seen,
    save_model,
    weight_files,
    whole_digest,
)
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.small import PATCH, small_config, write_model
from tests.s3 import S3Server

CONFIG = Config.model_validate({"name": "x", "cohort": {"uri": "c"}, "tasks": [{"name": "t", "column": "label"}]})


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, nn.Linear(3, 2).state_dict(), CONFIG)
    with pytest.raises(
        StageError, match=r"missing keys \['0.bias', '0.weight'\], unexpected keys \['bias', 'weight'\]"
    ):
        load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path)


def test_absent_or_damaged_files_are_stage_errors(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="config.json: cannot be read"):
        read_config(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(StageError, match="weights.safetensors: cannot be read"):
        load_weights(nn.Linear(3, 2), tmp_path)


TASKS = [
    {"name": "pr.status", "column": "a", "classes": ["no", "yes"]},
    {"name": "er", "column": "b", "classes": ["no", "yes"]},
    {"name": "1", "column": "c", "kind": "multiclass", "classes": ["x", "y", "z"]},
]


def _number_heads(folder: Path) -> None:
    """As they were saved before they had names, nor attention and positions said what they are."""
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if value.numel()}
    numbered = {re.sub(r"^heads\.(\d+):[^.]*\.", r"heads.\1.", name): value for name, value in weights.items()}
    assert sorted(name for name in numbered if name.startswith("heads.")) == [
        f"heads.{place}.{leaf}" for place in range(3) for leaf in ("bias", "weight")
    ]
    save_file(numbered, folder / WEIGHTS)


def _predicted(folder: Path, bag: TensorBag) -> BagPrediction:
    model, config = load_model(folder)
    return predict_bag(model, bag, config)


def test_what_a_model_has_seen_stands_beside_it_without_names(tmp_path: Path) -> None:
    assert read_seen(tmp_path) is None
    seen = Seen(frozenset({"b", "a"}), frozenset({Seen.patient("Jane Doe")}))
    (tmp_path / SEEN).write_text(json.dumps(seen.as_json()))
    assert read_seen(tmp_path) == seen
    assert "Jane" not in (tmp_path / SEEN).read_text()
    assert seen.as_json()["slides"] == ["a", "b"]
    assert seen.has({"x", "b"})
    assert seen.has({Seen.patient("Jane Doe")})
    assert not seen.has({"x", Seen.patient("a")})


def test_a_model_saved_before_heads_had_names_predicts_the_same_bits(tmp_path: Path) -> None:
    write_model(tmp_path, small_config(tasks=TASKS))
    bag = TensorBag(torch.randint(0, 256, (11, 3, PATCH, PATCH), dtype=torch.uint8))
    before = _predicted(tmp_path, bag)
    _number_heads(tmp_path)
    after = _predicted(tmp_path, bag)
    assert after.selected.tolist() == before.selected.tolist()
    for task in ("pr.status", "er", "1"):
        assert after.logits[task].tolist() == before.logits[task].tolist()


def test_numbered_heads_are_not_taken_for_those_of_another_order(tmp_path: Path) -> None:
    write_model(tmp_path, small_config(tasks=TASKS))
    _number_heads(tmp_path)
    model = build_model(small_config(tasks=TASKS[::-1]))
    with pytest.raises(StageError, match=r"of the tasks \('pr.status', 'er', '1'\), the model has \('1', 'er'"):
        load_weights(model, tmp_path)


def test_an_ensemble_is_kept_in_a_bucket_and_at_hand_from_there(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket, ensemble = server.bucket("ensemble"), tmp_path / "ensemble"
    for number in range(2):
        torch.manual_seed(number)
        (place := ensemble / MEMBERS / f"{number:02d}").mkdir(parents=True)
        save_model(place, build_model(small_config()).state_dict(), small_config())
    (ensemble / MEMBERS / EMBED_WEIGHTS).write_bytes(b"of all")
    (ensemble / MEMBERS / TISSUE_NETWORK).write_bytes(b"network")
    keep_any(ensemble, f"{bucket}/model")
    with ExitStack() as stack:
        local = at_hand(f"{bucket}/model", stack)
        assert [place.name for place in model_folders(local)] == ["0000", "0001"]
        assert whole_digest(local) == whole_digest(ensemble)
        assert (local / MEMBERS / TISSUE_NETWORK).read_bytes() == b"network"
        (local / MEMBERS / EMBED_WEIGHTS).write_bytes(b"of others")
        assert whole_digest(local) != whole_digest(ensemble)
    one = ensemble / MEMBERS / "00"
    assert model_folders(one) == [one]
    assert whole_digest(one) == model_digest(small_config(), weight_files(one))


def test_models_of_the_last_release_keep_their_digests() -> None:
    """Those that its code gave; by another one finished predictions and sweep cells would be made again."""

    def digest(**select: object) -> str:
        plain = small_config().model.model_dump()
        return model_digest(small_config(model={**plain, "select": {"memory": 5, "chunk": 7, **select}}), [])

    whole = "e0b26373fe8cd13dfbf720b8f69a5a6f"
    assert digest() == "83cbabd298aaf82b9d9a4429224e41b7"
    assert digest(context="all") == digest(context="all", learn_from="drawn") == whole  # nothing is learned any more
    assert digest(context="all", mode="window") == "47b95125fe0d0bcfc23dcd7c7b4d6f61"
    assert digest(rank="heads") != digest()


def test_what_is_no_model_of_an_ensemble_is_named(tmp_path: Path) -> None:
    (members := tmp_path / MEMBERS).mkdir()
    with pytest.raises(StageError, match=r"members: no model is in it; it holds a folder with weights.safetensors"):
        model_folders(tmp_path)
    for name in ("00", ".ipynb_checkpoints"):
        (members / name).mkdir()
    write_model(members / "00", small_config())
    with pytest.raises(StageError, match=r"members: without weights.safetensors, so no model: .ipynb_checkpoints;"):
        model_folders(tmp_path)


def test_models_of_several_recipes_are_no_ensemble(tmp_path: Path) -> None:
    tiling, task = small_config().tiling.model_dump(), small_config().tasks[0].model_dump()
    configs = {
        "00": small_config(),
        "01": small_config(name="other", tasks=[{**task, "column": "elsewhere"}]),  # nothing that is predicted
        "02": small_config(tiling={**tiling, "patch_px": 64, "mpp": 0.5}),
        "03": small_config(tasks=[{**task, "classes": ["yes", "no"]}]),
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, config)
    check_one_recipe([tmp_path / name for name in ("00", "01")])
    with pytest.raises(StageError) as error:
        check_one_recipe([tmp_path / name for name in configs])
    first, *said, _ = str(error.value).splitlines()
    assert "models of one recipe" in first
    assert said[0].startswith(f"  - {tmp_path / '02'}: tiling.mpp is 0.5, and null of 00")
    assert said[1].startswith(f"  - {tmp_path / '02'}: tiling.patch_px is 64, and 32 of 00")
    assert said[2].startswith(f"  - {tmp_path / '03'}: tasks is ")
    assert '["yes", "no"]' in said[2]
    assert len(said) == 3


def test_a_tissue_network_beside_a_model_is_the_one_that_is_named(tmp_path: Path) -> None:
    network = scripted(Toy(), tmp_path / "toy.pt")
    config = small_config(tiling=small_tiling(network))
    (alone := tmp_path / "alone").mkdir()
    (member := tmp_path / MEMBERS / "00").mkdir(parents=True)
    for folder, packed in ((alone, alone / TISSUE_NETWORK), (member, tmp_path / MEMBERS / TISSUE_NETWORK)):
        write_model(folder, config)
        assert read_config(folder) == config
        before = whole_digest(folder)
        packed.write_bytes(network.read_bytes())
        here = read_config(folder)
        assert here.tiling.tissue_model is not None
        assert here.tiling.tissue_model.uri == str(packed)
        assert (here.tiling.fingerprint(), whole_digest(folder)) == (config.tiling.fingerprint(), before)
    keep_any(alone, str(tmp_path / "kept"))
    kept = read_config(tmp_path / "kept").tiling.tissue_model
    assert kept is not None
    assert Path(kept.uri) == tmp_path / "kept" / TISSUE_NETWORK
    write_model(alone, small_config())
    assert read_config(alone) == small_config()  # which names none
