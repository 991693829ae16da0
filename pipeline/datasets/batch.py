"""Some patches or features of a store in memory, with where each is from."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import Image

from pipeline.errors import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 64  # patches of a contact sheet
_COLUMNS = 8
_GAP = 2  # px
_TILE = 96  # px

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """n rows of a store: patches (n, p, p, 3) uint8, or features (n, D) float16 or float32."""

    keys: tuple[str, ...]
    """Slide of each."""
    rows: Ints
    """(n,) of the slide."""
    x: Ints
    """(n,) level-0 px of the left edge."""
    y: Ints
    """(n,) of the upper edge."""
    data: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self) -> Tensor:
        """Patches as (n, 3, p, p) uint8, features as (n, D)."""
        import torch

        data = torch.from_numpy(self.data)
        return data.permute(0, 3, 1, 2) if data.ndim == 4 else data

    def table(self) -> pa.Table:
        """Where each is from: key, row, x, y."""
        return pa.table({"key": list(self.keys), "row": self.rows, "x": self.x, "y": self.y})

    def sheet(self) -> Image.Image:
        """The first 64 patches side by side, in rows of 8.

        Raises:
            TypeError: these are features.
        """
        if self.data.ndim != 4:
            raise TypeError("features are no pictures; open the store of patches to look at them")
        shown = self.data[:SHOWN]
        step, columns = _TILE + _GAP, min(_COLUMNS, max(1, len(shown)))
        sheet = Image.new("RGB", (columns * step - _GAP, max(1, -(-len(shown) // columns)) * step - _GAP), "white")
        for place, patch in enumerate(shown):
            tile = Image.fromarray(patch).resize((_TILE, _TILE), Image.Resampling.BOX)
            sheet.paste(tile, (place % columns * step, place // columns * step))
        return sheet

    def _repr_html_(self) -> str:
        told = f"{len(self)} {'patches' if self.data.ndim == 4 else 'features'} of {len(set(self.keys))} slides"
        shape = f"{escape(str(self.data.dtype))} {self.data.shape}"
        picture = picture_html(self.sheet()) if self.data.ndim == 4 and len(self) else ""
        return f"<div><p>{told}, {shape}</p>{picture}</div>"


def decoded(payloads: Sequence[bytes], edge: int, where: str) -> npt.NDArray[np.uint8]:
    """(n, edge, edge, 3) of n JPEGs.

    Raises:
        DamagedError: one cannot be decoded, or has another size.
    """
    out = np.empty((len(payloads), edge, edge, 3), np.uint8)
    for place, payload in enumerate(payloads):
        try:
            pixels = simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=out[place])
        except ValueError as error:
            raise DamagedError(f"{where}: a patch cannot be decoded ({error}); run `pipeline verify`") from error
        if pixels.shape != out.shape[1:]:
            raise DamagedError(f"{where}: a patch has {pixels.shape[:2]} px, not {edge}; run `pipeline verify`")
    return out


def picture_html(image: Image.Image) -> str:
    """A picture as HTML that needs no other file."""
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}">'
