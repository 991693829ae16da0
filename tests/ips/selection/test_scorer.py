from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import ips.selection.transfer
from ips.bag import Chunk
from ips.network.encoder import ResNet
from ips.network.model import IPSModel, evaluating
from ips.selection.scorer import Scorer, pad_rows
from ips.selection.select import select
from ips.selection.transfer import to_device
from tests.ips.nets import bag_of, resnet_model, tiny_model


def _patches(n: int = 8) -> torch.Tensor:
    return bag_of(n, h=37, w=29).patches


def _plain(model: IPSModel, patches: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return model.logits(model.embed(patches), None)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    "measures",
    [
        {},
        {"fold": False},
        {"fuse": False},
        {"channels_last": False},
        {"side_stream": False},
        {"device_normalise": False},
        {"dedupe": False},
        dict.fromkeys(("fold", "fuse", "channels_last", "side_stream", "device_normalise", "dedupe"), False),
    ],
)
def test_every_measure_alone_keeps_the_logits(name: str, measures: dict[str, bool]) -> None:
    model, patches = resnet_model(name), _patches()
    scorer = Scorer(model, batch=8, **measures)  # type: ignore[arg-type]
    found = scorer.content(scorer.receive(Chunk(patches, torch.arange(len(patches)))))[0]
    torch.testing.assert_close(found, _plain(model, patches), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("on", [True, False])
def test_each_measure_is_on_unless_told(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    def scorer(name: str) -> Scorer:
        return Scorer(resnet_model(), batch=8, **({} if on else {name: False}))  # type: ignore[arg-type]

    products = [tuple(product.shape) for product in scorer("fold")._products]
    assert products == ([(6, 128)] if on else [(15, 128), (6, 16)])  # J = 3 * 2; 3 heads of 5, padded to 16
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in scorer("fuse")._encoder.modules())
    assert norms == (0 if on else 10)
    weights = [p for p in scorer("channels_last")._encoder.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert len(weights) > 5
    assert all(p.is_contiguous(memory_format=torch.channels_last) == on for p in weights)
    asked: list[bool] = []

    def spy(patches: torch.Tensor, device: torch.device, *, side_stream: bool) -> torch.Tensor:
        asked.append(side_stream)
        return to_device(patches, device, side_stream=side_stream)

    monkeypatch.setattr(ips.selection.transfer, "to_device", spy)
    scorer("side_stream").receive(Chunk(_patches(), torch.arange(8)))
    assert asked == [on]


def test_pixels_travel_as_they_are_unless_told() -> None:
    model, patches = resnet_model(), _patches()
    chunk = Chunk(patches, torch.arange(len(patches)))
    assert Scorer(model).receive(chunk) is patches
    early = Scorer(model, device_normalise=False).receive(chunk)
    assert torch.equal(early, model.normalise(patches))


@pytest.mark.parametrize("device_normalise", [True, False])
def test_patches_are_prepared_before_they_are_looked_at(*, device_normalise: bool) -> None:
    model, patches = resnet_model(), _patches()
    chunk = Chunk(patches, torch.arange(len(patches)), prepare=lambda x: x.flip(-1))
    scorer = Scorer(model, device_normalise=device_normalise)
    assert torch.equal(scorer.receive(chunk), scorer.receive(replace(chunk, patches=patches.flip(-1), prepare=None)))


@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_a_float64_model_is_scored_in_float64(kind: str) -> None:
    model = (tiny_model(scale=1.0) if kind == "tiny" else resnet_model(scale=1.0)).double()
    scorer, patches = Scorer(model, batch=8), _patches()
    assert scorer.dtype == torch.float64
    with scorer.evaluating():
        found = scorer.content(patches)[0]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, _plain(model, patches), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("encoder", ["tiny", "resnet"])
def test_bfloat16_runs_the_encoder_in_bfloat16(encoder: str) -> None:
    model = tiny_model(scale=1.0) if encoder == "tiny" else resnet_model(scale=1.0)
    patches, full = _patches(), Scorer(model, batch=8)
    half = Scorer(model, batch=8, dtype=torch.bfloat16)
    with half.evaluating():
        a, b = full.content(patches)[0], half.content(patches)[0]
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("fuse", [True, False])
def test_refresh_takes_over_weights_and_statistics(fuse: bool) -> None:  # noqa: FBT001
    model, patches = resnet_model(), _patches()
    scorer = Scorer(model, batch=8, fuse=fuse)
    before = scorer.content(patches)[0]
    model.train()
    for _ in range(3):
        model.embed(patches).sum().backward()  # type: ignore[no-untyped-call]  # moves the running statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert torch.equal(scorer.content(patches)[0], before)
    scorer.refresh()
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(scorer.content(patches)[0], before, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["tiny", "resnet"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("fold", [True, False])
def test_the_callers_autocast_does_not_reach_inside(kind: str, dtype: torch.dtype | None, fold: bool) -> None:  # noqa: FBT001
    model = tiny_model(grid=True) if kind == "tiny" else resnet_model(grid=True)
    bags = [bag_of(19, h=37, w=29, grid=True)]
    expected = select(model, bags, 5, 8, scorer=Scorer(model, dtype=dtype, fold=fold))
    with torch.autocast("cpu", torch.bfloat16):
        scorer = Scorer(model, dtype=dtype, fold=fold)
        scorer.refresh()
        found = select(model, bags, 5, 8, scorer=scorer)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.scores, expected.scores)


def test_a_scorer_made_in_inference_mode_is_refreshed_out_of_it() -> None:
    model, patches = resnet_model(), _patches()
    with torch.inference_mode():
        scorer = Scorer(model, batch=8)
        scorer.content(patches)[0]
    with torch.no_grad():
        model.encoder.get_submodule("bn1").bias.add_(0.5)  # type: ignore[operator]
    scorer.refresh()
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 5), (40, 1)])
def test_patches_of_one_pixel_are_scored(h: int, w: int) -> None:
    model, patches = resnet_model(), bag_of(8, h=h, w=w).patches
    torch.testing.assert_close(Scorer(model, batch=8).content(patches)[0], _plain(model, patches), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_scorer_is_refreshed_without_compiling_again() -> None:
    model, patches = resnet_model(), _patches()
    scorer, graphs = Scorer(model, batch=8, compile=True), torch._dynamo.utils.counters["stats"]
    scorer.content(patches)[0]
    compiled = graphs["unique_graphs"]
    assert compiled > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    scorer.refresh()
    torch.testing.assert_close(scorer.content(patches)[0], _plain(model, patches), rtol=1e-3, atol=1e-2)
    assert graphs["unique_graphs"] == compiled


def test_the_model_is_not_part_of_the_copy() -> None:
    model = resnet_model()
    scorer = Scorer(model)
    model.train()
    with scorer.evaluating():
        assert model.encoder.training
    assert isinstance(scorer._encoder, ResNet)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in scorer._encoder.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.encoder.modules())


def test_evaluating_restores_each_mode() -> None:
    model = tiny_model().train()
    model.encoder.get_submodule("dropout").eval()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 // 0
    assert [m.training for m in model.modules()] == modes


def test_pad_rows_repeats_the_first() -> None:
    x = torch.arange(6).view(3, 2)
    assert pad_rows(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert pad_rows(x, 3) is x


def test_norms_without_running_statistics_are_refused() -> None:
    model = tiny_model()
    model.encoder.bn = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(ValueError, match="encoder: bn is a BatchNorm1d without running statistics"):
        Scorer(model)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.float32 must be.*float64"):
        Scorer(tiny_model().double(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dtype=torch\.float16 must be"):
        Scorer(tiny_model(), dtype=torch.float16)
    for batch in (0, 12, -8):
        with pytest.raises(ValueError, match=f"batch={batch} must be a multiple of 8"):
            Scorer(tiny_model(), batch=batch)


def test_a_copy_of_the_encoder_goes_with_its_last_user() -> None:
    """Not when Python looks for circles: a server makes one a slide."""
    gc.collect()
    gc.disable()
    try:
        scorer = Scorer(resnet_model(), batch=8)
        scorer.content(scorer.receive(Chunk(_patches(), torch.arange(8))))
        gone = weakref.ref(scorer._encoder)
        del scorer
        assert gone() is None
    finally:
        gc.enable()
