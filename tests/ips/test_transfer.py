from __future__ import annotations

import torch

from ips.transfer import to_device
from tests.ips.nets import bag_of


def test_what_is_there_is_not_copied() -> None:
    patches = bag_of(3).patches
    for side_stream in (True, False):
        assert to_device(patches, torch.device("cpu"), side_stream=side_stream) is patches
