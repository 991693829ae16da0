from __future__ import annotations

from pipeline.loop import StepDone
from pipeline.worker import _epoch_metrics, _validates, checkpoint_name


def test_the_last_epoch_always_validates() -> None:
    assert [epoch for epoch in range(1, 8) if _validates(epoch, 7, 3)] == [3, 6, 7]


def test_epoch_metrics_average_losses_and_count_patches() -> None:
    first = StepDone(4, 9, last_of_epoch=False, loss=1.0, lr=0.1, slides=2, patches=300, seconds=2.0, waited=0.5)
    last = StepDone(4, 10, last_of_epoch=True, loss=0.5, lr=0.1, slides=2, patches=100, seconds=2.0, waited=0.5)
    assert _epoch_metrics([first, last]) == {
        "epoch": 5.0,
        "train_loss": 0.75,
        "patches_per_s": 100.0,
        "device_wait": 0.25,
        "epoch_s": 4.0,
    }
    assert checkpoint_name(5) == "epoch-0005"
