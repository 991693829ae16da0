from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.datasets.opened import open_store
from tests.pipeline.datasets.made import DIM, as_written


def test_rows_of_all_slides_follow_one_another(patches: Path) -> None:
    store, written = open_store(str(patches)), as_written(patches)
    rows = store.torch()
    assert len(rows) == 60
    found = [rows[index] for index in (0, 19, 20, 59, -1)]
    assert [(item["key"], item["row"]) for item in found] == [
        *((sorted(written)[k], row) for k, row in ((0, 0), (0, 19), (1, 0), (2, 19), (2, 19)))
    ]
    assert all((item["x"], item["y"]) == written[item["key"]][item["row"]][:2] for item in found)
    slide = store["s2"]
    assert torch.equal(store.torch([slide])[4]["image"], slide.read([4]).tensor()[0])
    with pytest.raises(IndexError, match="60 rows"):
        rows[60]


def half(image: torch.Tensor) -> torch.Tensor:
    return image / 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_batches_them(features: Path, workers: int) -> None:
    data = open_store(str(features)).torch(transform=half)
    context = multiprocessing.get_context("spawn") if workers else None
    loader = DataLoader(data, batch_size=25, shuffle=True, num_workers=workers, multiprocessing_context=context)
    seen = [(key, row) for batch in loader for key, row in zip(batch["key"], batch["row"].tolist(), strict=True)]
    assert len(set(seen)) == 60
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["feature"].shape == (3, DIM)
    assert batch["feature"][2].tolist() == [(2 + k / 2) / 2 for k in range(DIM)]
