from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.inference.prediction import SlidePrediction
from pipeline.results import heatmaps
from pipeline.results.heatmaps import Sketchbook, draw
from pipeline.schema import ATTENTION


def _found(slide_id: str, attention: list[float]) -> SlidePrediction:
    n = len(attention)
    columns = [[slide_id] * n, range(n), [40 * k for k in range(n)], [30] * n, attention, [True] * n]
    table = pa.table(dict(zip(ATTENTION.names, columns, strict=True)), schema=ATTENTION)
    return SlidePrediction({}, table, np.full((97, 211, 3), 200, np.uint8), 1.0, 32.0, 0.5, 0)


@pytest.mark.parametrize("group_rows", [2, 100])
def test_slides_share_a_scale_and_each_has_its_own_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int
) -> None:
    monkeypatch.setattr(heatmaps, "GROUP_ROWS", group_rows)
    slides = {"a": [0.1, 0.2, 0.7], "b": [0.5, 0.5], "c": [0.05, 0.05, 0.05, 0.05, 0.8]}
    book = Sketchbook(tmp_path, "models:/demo/3")
    with pq.ParquetWriter(tmp_path / "attention.parquet", ATTENTION) as writer:
        for name, attention in slides.items():
            found = _found(name, attention)
            writer.write_table(found.attention, row_group_size=group_rows)
            book.add(f"{name}.png", name, ["lesion_1 0.971"], found)
    (tmp_path / "out").mkdir()
    draw(book.sketches, tmp_path / "attention.parquet", tmp_path / "out")

    shown = {
        name: np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("RGB")).astype(int) for name in slides
    }
    bars = [picture[:, -110:] for picture in shown.values()]
    assert all((bar == bars[0]).all() for bar in bars)  # the scale: one for all
    zoom = 900 / 211
    hot = {
        name: picture[14 + int(46 * zoom), 14 + int((40 * k + 16) * zoom)]
        for name, picture, k in zip(slides, shown.values(), (2, 1, 4), strict=True)
    }
    assert len({tuple(colour) for colour in hot.values()}) == 3
    assert len(set(hot["b"].tolist())) == 1  # uniform: grey
    assert hot["c"].sum() > hot["a"].sum()  # 4.0 and 2.1 times uniform
    assert book.sketches[0].caption[:2] == ("a", "lesion_1 0.971")
    assert book.sketches[0].caption[2].startswith("models:/demo/3, 20")
