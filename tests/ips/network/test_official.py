from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ips.bag import TensorBag
from ips.network.aggregator import Aggregator
from ips.network.encoder import FeatureProjector, ResNet
from ips.network.heads import linear_head
from ips.network.model import IPSModel
from ips.network.official import convert_official, load_official
from ips.network.positions import IndexPositions
from ips.selection.baselines import every_patch
from ips.selection.select import gather, select
from tests.oracle import OfficialNet

_TASKS = ["majority", "max", "top", "multi"]


def _ours(*, channels: int = 1, stages: int = 2, classes: int = 10, tasks: Sequence[str] = tuple(_TASKS)) -> IPSModel:
    trunk = ResNet("resnet18", stages, channels)  # type: ignore[arg-type]
    aggregator = Aggregator(trunk.dim, len(tasks), 8, 16, 16, 64)
    return IPSModel(trunk, aggregator, {t: nn.Linear(trunk.dim, classes) for t in tasks}, IndexPositions(trunk.dim))


def _official() -> OfficialNet:
    torch.manual_seed(0)
    net = OfficialNet(ResNet("resnet18", 2, 1), _TASKS, 10, H=8, D_k=16, D_v=16, D_inner=64, N=61)
    net(torch.rand(8, 3, 1, 21, 19), torch.zeros(8, 3, dtype=torch.int64))  # statistics other than the initial ones
    return net.eval()


def test_a_converted_model_gives_the_official_outputs() -> None:
    official, model = _official(), _ours()
    load_official(model, official.state_dict())
    model.eval()
    images = torch.rand(2, 61, 1, 21, 19) * torch.rand(2, 61, 1, 1, 1)
    rows = official.ips(images, 9, 6)
    theirs = official(torch.stack([image[kept] for image, kept in zip(images, rows, strict=True)]), rows)
    bags = [TensorBag(image) for image in images]
    selection = select(model, bags, 9, 6, "window")
    assert torch.equal(selection.index, rows)
    ours = model(gather(bags, selection, "cpu"))
    for task in _TASKS:
        probabilities = ours[task].sigmoid() if task == "multi" else ours[task].softmax(-1)
        torch.testing.assert_close(probabilities, theirs[task])


def test_tasks_may_stand_in_another_order_that_is_told() -> None:
    state, tasks = _official().state_dict(), ["multi", "majority", "top", "max"]
    ours, other = _ours().eval(), _ours(tasks=tasks).eval()
    with pytest.raises(ValueError, match=r"order \['majority', 'max', 'top', 'multi'\], the tasks are \['multi', 'maj"):
        load_official(other, state)
    load_official(ours, state)
    load_official(other, state, tokens=_TASKS)
    batch = gather([bag := TensorBag(torch.rand(11, 1, 21, 19))], every_patch([bag]), "cpu")
    for task, logits in ours(batch).items():
        torch.testing.assert_close(other(batch)[task], logits)
    by_name = dict(sorted(state.items()))  # as safetensors files are
    with pytest.raises(ValueError, match=r"order \['majority', 'max', 'multi', 'top'\], the tasks are"):
        load_official(ours, by_name)
    load_official(ours, by_name, tokens=_TASKS)
    assert torch.equal(ours.aggregator.get_parameter("attention.queries"), state["transf.crs_attn.q"][0])
    with pytest.raises(ValueError, match=r"tokens=\['majority', 'max', 'top'\] must be the tasks"):
        load_official(ours, state, tokens=_TASKS[:3])


@pytest.mark.parametrize("shape", [(4, 128), (2, 4, 128), (1, 3, 128)])
def test_queries_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    state = {**_official().state_dict(), "transf.crs_attn.q": torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"crs_attn.q has shape \({str(shape)[1:-1]}\); needs \(1, 4, D\)"):
        load_official(_ours(), state)


def test_the_twin_runs_where_its_images_are() -> None:
    """On the meta device, where a tensor left on the CPU is an error as on a GPU; names stay the official ones."""
    official = _official()
    assert not any("pos_enc" in name for name in official.state_dict())
    official = official.to("meta")
    images = torch.empty(2, 61, 1, 21, 19, device="meta")
    rows = official.ips(images, 9, 6)
    assert {out.device.type for out in official(images[:, :9], rows).values()} == {"meta"}
    assert official.ips(images[:, :5], 9, 6).device.type == "meta"


def test_the_feature_network_converts() -> None:
    projector = FeatureProjector(9, 8)
    model = IPSModel(projector, Aggregator(8, 1, 2, 3, 3, 5), {"t": nn.Linear(8, 2)})
    encoder = nn.Sequential(nn.LayerNorm(9, elementwise_affine=False), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU())
    twin = OfficialNet(ResNet("resnet18"), ["t"], 2, H=2, D_k=3, D_v=3, D_inner=5)
    others = {name: value for name, value in twin.state_dict().items() if not name.startswith("encoder")}
    state = {**others, **{f"encoder.{name}": value for name, value in encoder.state_dict().items()}}
    with pytest.raises(ValueError, match="has shape"):  # the twin's width is 512
        load_official(model, state)
    converted = convert_official(state, ["t"])
    projector.load_state_dict({n.removeprefix("encoder."): v for n, v in converted.items() if n.startswith("encoder.")})
    x = torch.randn(5, 9)
    torch.testing.assert_close(projector.eval()(x), encoder.eval()(x))


def test_foreign_names_are_listed() -> None:
    state = {**_official().state_dict(), "pos_enc": torch.zeros(1), "encoder.99.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"tasks \['majority', 'max', 'top'\]: output_layers.multi.0.weight"):
        convert_official(_official().state_dict(), _TASKS[:3])
    with pytest.raises(ValueError, match=r"pos_enc, encoder\.99\.weight"):
        convert_official(state, _TASKS)


def test_other_sizes_are_refused() -> None:
    state = _official().state_dict()
    with pytest.raises(ValueError, match=r"encoder\.conv1\.weight has shape \(64, 1, 7, 7\), needs \(64, 3, 7, 7\)"):
        load_official(_ours(channels=3), state)
    with pytest.raises(ValueError, match=r"missing encoder\.layer3"):
        load_official(_ours(stages=4), state)
    with pytest.raises(ValueError, match=r"heads\.0:majority\.weight has shape"):
        load_official(_ours(classes=4), state)


def test_what_a_fork_has_for_training_alone_is_left_out_when_told() -> None:
    official, model = _official(), _ours()
    state = {**official.state_dict(), "transf.crs_attn.fb.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"transf\.crs_attn\.fb\.weight; ignore=\(\.\.\.\) leaves out"):
        load_official(model, state)
    load_official(model, state, ignore=("transf.crs_attn.fb.weight",))
    assert torch.equal(model.aggregator.get_parameter("attention.queries"), state["transf.crs_attn.q"][0])
    with pytest.raises(ValueError, match=r"missing aggregator\.attention\.key_proj\.weight"):
        load_official(model, state, ignore=("transf.crs_attn.fb.weight", "transf.crs_attn.k_w.weight"))


def test_heads_may_say_their_kinds() -> None:
    trunk = ResNet("resnet18", 2, 1)
    heads = {task: linear_head("multiclass", trunk.dim, 10) for task in _TASKS}
    model = IPSModel(trunk, Aggregator(trunk.dim, 4, 8, 16, 16, 64), heads, IndexPositions(trunk.dim))
    state = _official().state_dict()
    load_official(model, state)
    assert torch.equal(model.heads["top"].get_parameter("weight"), state["output_layers.top.0.weight"])
