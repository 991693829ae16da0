"""Vision transformers (Dosovitskiy et al. 2021) as the pathology encoders have them, with timm's state-dict names.

So their published weights load, and timm itself is not needed. Layer scale (Touvron et al. 2021), register tokens
(Darcet et al. 2024), a gated MLP (SwiGLU, Shazeer 2020) and a pooling attention (CoCa, Yu et al. 2022) where a network
has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ips.network.part import PatchEncoder

_EPS = 1e-6  # of every layer norm but those of the pooling attention
_POOL_HEADS = 8


@dataclass(frozen=True)
class Architecture:
    """What a vision transformer is made of."""

    image: int
    """Edge of what it was trained on, px; patches of another size are resized to it."""
    patch: int
    """Edge of a token's square, px."""
    dim: int
    depth: int
    heads: int
    hidden: int
    """Width of the MLP's first layer; of a gated one that of both halves together."""
    gated: bool = False
    """SwiGLU instead of GELU."""
    registers: int = 0
    places_all: bool = True
    """Whether the class token and the registers have positions too (timm's `no_embed_class` turned round)."""
    pool: Literal["class", "class+mean", "attention"] = "class"
    """What a patch's embedding is: the class token, that beside the mean of the squares' tokens, or what one learned
    query attends to of all tokens."""
    pooled: int = 0
    """attention: width of the query, and of the embedding."""
    placed: int | None = None
    """Edge of the images that positions were learned on, px; those of `image` lie between them. None: `image`."""

    @property
    def width(self) -> int:
        """D of the embedding."""
        return self.pooled if self.pool == "attention" else self.dim * (2 if self.pool == "class+mean" else 1)


class VisionTransformer(PatchEncoder):
    """(n, 3, h, w) -> (n, D). Weights are drawn at random, as the ones to be loaded."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        made, dim = architecture, architecture.dim
        self.made, self.dim, self.channels = made, made.width, 3
        squares, prefix = ((made.placed or made.image) // made.patch) ** 2, 1 + made.registers
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        if made.registers:
            self.reg_token = nn.Parameter(torch.randn(1, made.registers, dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, squares + (prefix if made.places_all else 0), dim) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, made.patch, made.patch)})
        self.blocks = nn.Sequential(*(_Block(made) for _ in range(made.depth)))
        self.norm = nn.LayerNorm(dim, _EPS)
        if made.pool == "attention":
            self.pooler = _Pooler(dim, made.pooled)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) float -> (n, D)."""
        edge = self.made.image
        if x.shape[2:] != (edge, edge):
            x = nn.functional.interpolate(x, (edge, edge), mode="bilinear", antialias=True)
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        before: Tensor = torch.cat([self.cls_token, self.reg_token], dim=1) if self.made.registers else self.cls_token
        before = before.expand(len(x), -1, -1)
        if self.made.places_all:
            tokens = torch.cat([before, tokens], dim=1) + self._places()
        else:
            tokens = torch.cat([before, tokens + self._places()], dim=1)
        tokens = self.norm(self.blocks(tokens))
        if self.made.pool == "attention":
            pooled: Tensor = self.pooler(tokens)
            return pooled
        first: Tensor = tokens[:, 0]
        if self.made.pool == "class":
            return first
        return torch.cat([first, tokens[:, 1 + self.made.registers :].mean(dim=1)], dim=1)

    def _places(self) -> Tensor:
        """(1, tokens, dim) positions; learned on fewer squares they are drawn out as DINO does it (bicubic, +0.1)."""
        made = self.made
        if made.placed is None:
            return self.pos_embed
        prefix = 1 + made.registers if made.places_all else 0
        side, wanted = made.placed // made.patch, made.image // made.patch
        squares = self.pos_embed[:, prefix:].view(1, side, side, made.dim).permute(0, 3, 1, 2)
        factor = (wanted + 0.1) / side
        squares = nn.functional.interpolate(squares, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :prefix], squares.flatten(2).transpose(1, 2)], dim=1)


class _Pooler(nn.Module):
    """One query attends to all tokens, without biases, and is normed: (n, tokens, dim) -> (n, width)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.ln_k, self.ln_q, self.norm = nn.LayerNorm(dim), nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.to_kv = nn.Linear(dim, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        k, v = self.to_kv(self.ln_k(x)).view(n, length, 2, _POOL_HEADS, -1).permute(2, 0, 3, 1, 4)
        q = self.to_q(self.ln_q(self.query)).view(1, 1, _POOL_HEADS, -1).transpose(1, 2).expand(n, -1, -1, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.norm(self.to_out(mixed.reshape(n, -1)))
        return out


class _Block(nn.Module):
    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(made.dim, _EPS), nn.LayerNorm(made.dim, _EPS)
        self.attn = _Attention(made.dim, made.heads)
        self.ls1, self.ls2 = _Scale(made.dim), _Scale(made.dim)
        self.mlp = _MLP(made)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, dim))
        return out


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _MLP(nn.Module):
    def __init__(self, made: Architecture) -> None:
        super().__init__()
        self.gated = made.gated
        self.fc1 = nn.Linear(made.dim, made.hidden)
        self.fc2 = nn.Linear(made.hidden // (2 if made.gated else 1), made.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = nn.functional.silu(gate) * x
        else:
            x = nn.functional.gelu(x)
        out: Tensor = self.fc2(x)
        return out


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' Dinov2Model under timm's names; another one as it is."""
    if "embeddings.cls_token" not in state:
        return dict(state)
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "embeddings.mask_token" or ".attention.attention." in name:  # of pre-training alone; joined below
            continue
        parts = name.removeprefix("encoder.").replace("layer.", "blocks.", 1) if "encoder." in name else name
        for theirs, ours in names.items():
            parts = parts.replace(theirs, ours)
        found[parts] = value
    for name in [name for name in state if name.endswith(".attention.attention.query.weight")]:
        before = name.removesuffix("query.weight")
        block = before.removeprefix("encoder.layer.").partition(".")[0]
        for kind in ("weight", "bias"):
            whole = [state[f"{before}{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(whole)
    return found


def from_conch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of CONCH v1.5's vision tower under the names here; another one as it is."""
    names = {"trunk.": "", "attn_pool_contrast.": "pooler.", "ln_contrast.": "pooler.norm."}

    def ours(name: str) -> str:
        found = next((theirs for theirs in names if name.startswith(theirs)), None)
        return name if found is None else names[found] + name.removeprefix(found)

    return {ours(name): value for name, value in state.items()}
