"""Slow and obvious references, written apart from the product: of `ips` they share the weights, and no algorithm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from ips.network.aggregator import Aggregator
from ips.network.encoder import ResNet
from ips.network.model import IPSModel


def exact_selection(
    model: IPSModel, patches: Tensor, positions: Tensor | None, memory: int
) -> tuple[list[int], list[float]]:
    """The definition: one patch at a time through the network, keys head by head, float64 softmax over the image.

    Returns the rows of the winners, best first, and the scores of all patches.
    """
    aggregator = model.aggregator
    assert isinstance(aggregator, Aggregator)
    attention = aggregator.attention
    columns = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for n in range(len(patches)):
            x = model.embed(patches[n : n + 1])
            if model.position is not None:
                assert positions is not None
                x = x + model.position(positions[n : n + 1])
            keys = attention.key_proj(x)[0].double()
            queries = attention.query_proj(attention.queries).double()
            size = attention.key_dim
            columns.append(
                [
                    float(queries[t, h * size : (h + 1) * size] @ keys[h * size : (h + 1) * size]) / math.sqrt(size)
                    for h in range(attention.heads)
                    for t in range(attention.tasks)
                ]
            )
    model.train(training)
    weights = torch.tensor(columns, dtype=torch.float64).softmax(dim=0)
    scores = [float(score) for score in weights.mean(dim=1)]
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    return order[:memory], scores


def taken_in_turns(logits: Sequence[Sequence[float]], memory: int) -> list[int]:
    """Logits of N rows, J each: one column after another, and again, takes its highest row of those left."""
    left, taken = list(range(len(logits))), list[int]()
    while left and len(taken) < memory:
        turn = len(taken) % len(logits[0])
        first = max(left, key=lambda n: (logits[n][turn], -n))
        left.remove(first)
        taken.append(first)
    return taken


def full_attention(model: IPSModel, x: Tensor) -> dict[str, Tensor]:
    """What the network says of one image, pooled over all of x (N, D): keys and values of every patch, head by head.

    In the precision of the weights, with a graph; no dropout.
    """
    aggregator = model.aggregator
    assert isinstance(aggregator, Aggregator)
    attention = aggregator.attention
    keys, values, queries = attention.key_proj(x), attention.value_proj(x), attention.query_proj(attention.queries)
    tokens = []
    for t in range(attention.tasks):
        pooled = []
        for h in range(attention.heads):
            k, v = h * attention.key_dim, h * attention.value_dim
            logits = keys[:, k : k + attention.key_dim] @ queries[t, k : k + attention.key_dim]
            weights = torch.softmax(logits / math.sqrt(attention.key_dim), dim=0)
            pooled.append(weights @ values[:, v : v + attention.value_dim])
        token = aggregator.attention_norm(attention.out_proj(torch.cat(pooled)) + attention.queries[t])
        tokens.append(aggregator.mlp_norm(aggregator.mlp(token) + token))
    return {task: head(tokens[t]) for t, (task, head) in enumerate(model.heads.items())}


class _OfficialAttention(nn.Module):
    """Parameters by the official names; keys and values of every patch are computed and stored."""

    def __init__(self, T: int, H: int, D: int, D_k: int, D_v: int, dropout: float) -> None:
        super().__init__()
        self.H, self.D_k = H, D_k
        self.q = nn.Parameter(torch.empty(1, T, D).uniform_(-1 / math.sqrt(D_k), 1 / math.sqrt(D_k)))
        self.q_w = nn.Linear(D, H * D_k, bias=False)
        self.k_w = nn.Linear(D, H * D_k, bias=False)
        self.v_w = nn.Linear(D, H * D_v, bias=False)
        self.fc = nn.Linear(H * D_v, D, bias=False)
        self.layer_norm = nn.LayerNorm(D, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], self.H, -1).transpose(1, 2)

    def weights(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, H, T, n)."""
        q, k = self._heads(self.q_w(self.q)), self._heads(self.k_w(x))
        out: Tensor = self.dropout(torch.softmax(torch.matmul(q / self.D_k**0.5, k.transpose(2, 3)), dim=-1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.matmul(self.weights(x), self._heads(self.v_w(x)))
        mixed = mixed.transpose(1, 2).reshape(len(x), self.q.shape[1], -1)
        out: Tensor = self.layer_norm(self.dropout(self.fc(mixed)) + self.q)
        return out


class _OfficialMLP(nn.Module):
    def __init__(self, D: int, D_inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(D, D_inner), nn.Linear(D_inner, D)
        self.layer_norm = nn.LayerNorm(D, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer_norm(self.dropout(self.w_2(torch.relu(self.w_1(x)))) + x)
        return out


class _OfficialTransformer(nn.Module):
    def __init__(self, T: int, H: int, D: int, D_k: int, D_v: int, D_inner: int, dropout: float) -> None:
        super().__init__()
        self.crs_attn = _OfficialAttention(T, H, D, D_k, D_v, dropout)
        self.mlp = _OfficialMLP(D, D_inner, dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.crs_attn(x))
        return out


def _table(D: int, N: int) -> Tensor:
    """The official 1-D position table (N, D)."""
    angle = torch.arange(N)[:, None].float() * torch.exp(torch.arange(0, D, 2).float() * -(math.log(10000.0) / D))
    table = torch.zeros(N, D)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table


class OfficialNet(nn.Module):
    """Faithful float32 twin of the official network and loop, with its parameter names, defects included.

    Shuffling is left to the caller (permute the patches); `multi` tasks give sigmoids, all others softmaxes.
    """

    pos_enc: Tensor | None
    """(N, D); moves with the network, and the official state dict does not have it."""

    def __init__(
        self,
        trunk: ResNet,
        tasks: Sequence[str],
        classes: int,
        *,
        H: int,
        D_k: int,
        D_v: int,
        D_inner: int,
        dropout: float = 0.1,
        N: int | None = None,
    ) -> None:
        super().__init__()
        stages = [trunk.get_submodule(stage) for stage in trunk.stages]
        self.encoder = nn.Sequential(
            trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *stages, nn.AdaptiveAvgPool2d((1, 1))
        )
        self.transf = _OfficialTransformer(len(tasks), H, trunk.dim, D_k, D_v, D_inner, dropout)
        self.output_layers = nn.ModuleDict(
            {
                t: nn.Sequential(nn.Linear(trunk.dim, classes), nn.Sigmoid() if t == "multi" else nn.Softmax(-1))
                for t in tasks
            }
        )
        self.register_buffer("pos_enc", None if N is None else _table(trunk.dim, N), persistent=False)

    def _embed(self, patches: Tensor) -> Tensor:
        """(B, n, C, h, w) -> (B, n, D)."""
        flat: Tensor = self.encoder(patches.reshape(-1, *patches.shape[2:]))
        return flat.view(len(patches), patches.shape[1], -1)

    @torch.no_grad()
    def ips(self, patches: Tensor, M: int, I: int) -> Tensor:  # noqa: E741, the paper's name
        """The official loop: patches (B, N, C, h, w) -> rows kept (B, M), in the buffer's order."""
        B, N = patches.shape[:2]
        rows = torch.arange(N, device=patches.device).expand(B, -1)
        if M >= N:
            return rows
        training = self.training
        self.encoder.eval()
        self.transf.eval()
        buffer, kept = self._embed(patches[:, :M]), rows[:, :M]
        for start in range(M, N, I):
            stop = min(start + I, N)
            pool = torch.cat((buffer, self._embed(patches[:, start:stop])), dim=1)
            index = torch.cat((kept, rows[:, start:stop]), dim=1)
            placed = pool if self.pos_enc is None else pool + self.pos_enc[index]
            score = self.transf.crs_attn.weights(placed).mean(dim=1).mean(dim=1)
            top = torch.topk(score, M, dim=-1).indices
            buffer = torch.gather(pool, 1, top[..., None].expand(-1, -1, pool.shape[-1]))
            kept = torch.gather(index, 1, top)
        self.encoder.train(training)
        self.transf.train(training)
        return kept

    def forward(self, patches: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Selected patches (B, M, C, h, w) and their rows (B, M) -> task -> probabilities (B, K)."""
        x = self._embed(patches)
        if self.pos_enc is not None:
            x = x + self.pos_enc[rows]
        tokens = self.transf(x)
        return {task: layer(tokens[:, i]) for i, (task, layer) in enumerate(self.output_layers.items())}


def patch_of(picture: Image.Image, corner: tuple[int, int], extent: float, edge: int) -> npt.NDArray[np.uint8]:
    """A patch by its definition: the square of `extent` px at a corner, area-averaged; white beyond the slide."""
    x, y = corner
    canvas = Image.new("RGB", (math.ceil(x + extent), math.ceil(y + extent)), "white")
    canvas.paste(picture)
    return np.asarray(canvas.resize((edge, edge), Image.Resampling.BOX, (x, y, x + extent, y + extent)))


def uncovered(mask: npt.NDArray[np.bool_], scale: int, boxes: npt.NDArray[np.float64]) -> float:
    """Share of the tissue that lies in none of the boxes (left, top, right, bottom: whole level-0 px).

    Every level-0 px is looked at; one px of the mask stands for scale x scale of them.
    """
    tissue = np.kron(mask, np.ones((scale, scale), np.bool_))
    left = tissue.copy()
    for x0, y0, x1, y1 in boxes.astype(int).tolist():
        left[y0:y1, x0:x1] = False
    return float(left.sum() / tissue.sum())


def catalogue_view(
    appended: Sequence[Mapping[str, Any]], removed: Collection[bytes]
) -> dict[str, list[dict[str, Any]]]:
    """What a catalogue says where these rows were appended, and those of these ids removed."""
    rows = sorted((row for row in appended if row["id"] not in removed), key=lambda row: row["id"])
    slides: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        best = slides.get(row["key"])
        if row["kind"] == "slide" and (best is None or row["n_bad_tiles"] < best["n_bad_tiles"]):
            slides[row["key"]] = row
    sources: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["kind"] != "source" or (row["key"] is not None and row["key"] not in slides):
            continue
        best = sources.get(row["asked"])
        if best is None or _weight(row) > _weight(best):
            sources[row["asked"]] = row
    return {
        name: [dict(found[key]) for key in sorted(found)] for name, found in (("sources", sources), ("slides", slides))
    }


def _weight(row: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Of a source's outcome: there before quarantined, a verdict before one that higher limits may overturn."""
    limits = [float("inf") if row[name] is None else row[name] for name in ("max_seconds", "max_gib")]
    return row["key"] is not None, limits[0], limits[1]


def clustered_delong(
    first: Sequence[float], second: Sequence[float], positive: Sequence[bool], patients: Sequence[str]
) -> tuple[float, float]:
    """The difference of two AUC and its standard error by Obuchowski (1997), from all pairs, sum by sum."""
    held = [i for i, flag in enumerate(positive) if flag]
    others = [i for i, flag in enumerate(positive) if not flag]

    def order(scores: Sequence[float], i: int, j: int) -> float:
        return 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0

    def gap(i: int, j: int) -> float:
        return order(first, i, j) - order(second, i, j)

    value = sum(gap(i, j) for i in held for j in others) / (len(held) * len(others))
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for i in held:
        part = sum(gap(i, j) for j in others) / len(others) - value
        ours[patients[i]] = ours.get(patients[i], 0.0) + part
    for j in others:
        part = sum(gap(i, j) for i in held) / len(held) - value
        theirs[patients[j]] = theirs.get(patients[j], 0.0) + part

    def spread(sums: dict[str, float]) -> float:
        return sum(x * x for x in sums.values()) * (len(sums) / (len(sums) - 1) if len(sums) > 1 else 1.0)

    whole = len(set(patients))
    both = sum(x * theirs[name] for name, x in ours.items() if name in theirs)
    both *= whole / (whole - 1) if whole > 1 else 1.0
    m, n = len(held), len(others)
    return value, math.sqrt(max(0.0, spread(ours) / m**2 + spread(theirs) / n**2 + 2 * both / (m * n)))


def holm_by_steps(ps: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses fall: the smallest p at alpha / m, the next at alpha / (m - 1), until one stands."""
    fallen = [False] * len(ps)
    for step, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[place] * (len(ps) - step) > alpha:
            break
        fallen[place] = True
    return fallen


def sharpness_by_px(rgb: npt.NDArray[np.uint8]) -> Fraction:
    """Variance of the Laplacian of a picture (h, w, 3), px by px, exact."""
    grey = [[(19595 * int(r) + 38470 * int(g) + 7471 * int(b) + 32768) // 65536 for r, g, b in line] for line in rgb]
    found = [
        grey[y - 1][x] + grey[y + 1][x] + grey[y][x - 1] + grey[y][x + 1] - 4 * grey[y][x]
        for y in range(1, len(grey) - 1)
        for x in range(1, len(grey[0]) - 1)
    ]
    if not found:
        return Fraction(0)
    mean = Fraction(sum(found), len(found))
    return sum(((value - mean) ** 2 for value in found), Fraction(0)) / len(found)


def isotonic_by_means(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Isotonic regression: of each place the largest, over where a block may begin, of the least mean to an end."""

    def mean(first: int, last: int) -> float:
        own = range(first, last + 1)
        return sum(values[i] * weights[i] for i in own) / sum(weights[i] for i in own)

    n = len(values)
    return [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
