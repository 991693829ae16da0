from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ips.network.transformer import Architecture, VisionTransformer, from_conch, from_transformers

PLAIN = Architecture(image=21, patch=7, dim=12, depth=2, heads=3, hidden=20)
KINDS = {
    "plain": PLAIN,
    "registers": replace(PLAIN, registers=4, gated=True, pool="class+mean"),
    "unplaced": replace(PLAIN, registers=2, places_all=False, gated=True),
    "pooled": replace(PLAIN, pool="attention", pooled=16, placed=14),
}


def drawn(made: Architecture) -> VisionTransformer:
    """With weights large enough that every part of it shows."""
    torch.manual_seed(1)
    network = VisionTransformer(made)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


def normed(x: Tensor, state: Mapping[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def drawn_out(places: Tensor, wanted: int) -> Tensor:
    """Positions (side, side, dim) at (wanted, wanted, dim): Keys' cubic convolution (1981) with a = -0.75, by hand."""
    side = len(places)

    def weights(at: float) -> list[tuple[int, float]]:
        first, found = math.floor(at), []
        for place in range(first - 1, first + 3):
            x = abs(at - place)
            inner, outer = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            found.append((min(max(place, 0), side - 1), inner if x <= 1 else outer))
        return found

    source = [weights((number + 0.5) * side / (wanted + 0.1) - 0.5) for number in range(wanted)]
    rows = [[sum(w * v * places[y, x] for y, w in row for x, v in column) for column in source] for row in source]
    return torch.stack([torch.stack(row) for row in rows])  # type: ignore[arg-type]


def pooled(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """What one query of 16 numbers attends to of tokens (n, dim), by eight heads of two."""
    query = normed(state["pooler.query"], state, "pooler.ln_q", 1e-5) @ state["pooler.to_q.weight"].T
    k, v = (normed(x, state, "pooler.ln_k", 1e-5) @ state["pooler.to_kv.weight"].T).chunk(2, dim=1)
    heads = []
    for head in range(8):
        own = slice(2 * head, 2 * head + 2)
        heads.append(torch.softmax(query[:, own] @ k[:, own].T / math.sqrt(2), dim=-1) @ v[:, own])
    return normed(torch.cat(heads, dim=1) @ state["pooler.to_out.weight"].T, state, "pooler.norm", 1e-5)[0]


def slowly(made: Architecture, state: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """One image (3, h, w), square by square and head by head, as the papers write it."""
    side = made.image // made.patch
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = [state["cls_token"][0, 0], *(state["reg_token"][0] if made.registers else ())]
    for row in range(side):
        for column in range(side):
            square = image[:, row * made.patch :, column * made.patch :][:, : made.patch, : made.patch]
            tokens.append((weight * square).sum(dim=(1, 2, 3)) + bias)
    x, first = torch.stack(tokens), 1 + made.registers
    placed = 0 if made.places_all else first
    places = state["pos_embed"][0]
    if made.placed is not None:
        before = made.placed // made.patch
        squares = drawn_out(places[first:].view(before, before, made.dim), side)
        places = torch.cat([places[:first], squares.view(-1, made.dim)])
    x = torch.cat([x[:placed], x[placed:] + places])
    width = made.dim // made.heads
    for block in range(made.depth):
        name = f"blocks.{block}"
        qkv = linear(normed(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
        heads = []
        for head in range(made.heads):
            q, k, v = (qkv[:, part * made.dim + head * width :][:, :width] for part in range(3))
            heads.append(torch.softmax(q @ k.T / math.sqrt(width), dim=-1) @ v)
        x = x + state[f"{name}.ls1.gamma"] * linear(torch.cat(heads, dim=1), state, f"{name}.attn.proj")
        y = linear(normed(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
        if made.gated:
            gate, y = y[:, : made.hidden // 2], y[:, made.hidden // 2 :]
            y = gate * torch.sigmoid(gate) * y
        else:
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + state[f"{name}.ls2.gamma"] * linear(y, state, f"{name}.mlp.fc2")
    x = normed(x, state, "norm")
    if made.pool == "attention":
        return pooled(x, state)
    return x[0] if made.pool == "class" else torch.cat([x[0], x[first:].mean(dim=0)])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_papers_write(kind: str) -> None:
    network = drawn(KINDS[kind])
    images = torch.randn(3, 3, 21, 21)
    with torch.inference_mode():
        found = network(images)
        wanted = torch.stack([slowly(KINDS[kind], network.state_dict(), image) for image in images])
    assert found.shape == (3, network.dim) == (3, KINDS[kind].width)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_patches_of_another_size_are_resized() -> None:
    network, images = drawn(PLAIN), torch.randn(2, 3, 40, 33)
    small = torch.nn.functional.interpolate(images, (21, 21), mode="bilinear", antialias=True)
    with torch.inference_mode():
        assert torch.equal(network(images), network(small))


def test_transformers_names_become_timm_s() -> None:
    """A Dinov2Model's state dict, made of ours by its own naming."""
    network = drawn(PLAIN)
    state = {"embeddings.mask_token": torch.zeros(1, 12)}
    for name, value in network.state_dict().items():
        block, _, inside = name.removeprefix("blocks.").partition(".")
        before = f"encoder.layer.{block}."
        if inside.startswith("attn.qkv."):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{before}attention.attention.{part}.{inside.rpartition('.')[2]}"] = piece
        elif name.startswith("blocks."):
            inside = inside.replace("attn.proj", "attention.output.dense")
            state[
                before
                + inside.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
            ] = value
        else:
            theirs = {
                "cls_token": "embeddings.cls_token",
                "pos_embed": "embeddings.position_embeddings",
                "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
                "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
            }
            state[theirs.get(name, name.replace("norm.", "layernorm."))] = value
    assert "encoder.layer.1.attention.output.dense.bias" in state
    back = from_transformers(state)
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())
    assert from_transformers(network.state_dict()).keys() == network.state_dict().keys()


def test_names_of_a_tower_with_a_pooler_become_ours() -> None:
    state = drawn(KINDS["pooled"]).state_dict()
    theirs = {}
    for name, value in state.items():
        after = name.removeprefix("pooler.")
        inside = f"ln_contrast.{after[5:]}" if after.startswith("norm.") else f"attn_pool_contrast.{after}"
        theirs[inside if name.startswith("pooler.") else f"trunk.{name}"] = value
    assert {"trunk.cls_token", "trunk.blocks.1.mlp.fc2.bias", "ln_contrast.weight"} < theirs.keys()
    assert {"attn_pool_contrast.query", "attn_pool_contrast.to_kv.weight"} < theirs.keys()
    back = from_conch(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert from_conch(state).keys() == state.keys()
