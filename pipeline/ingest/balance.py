"""Equal portions of tiling work: small slides in groups, a large slide in shares of its parts.

A task should hold about 8192 patches of 256 px: seconds of work, of which Ray's milliseconds are a small part, and
little to lose when its process dies. How many patches a slide has is known once it is opened and its tissue found;
until then its bytes tell, which cost nothing to know: glass compresses to almost none, so they follow the tissue.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pipeline.store.parts import part_patches

TASK_PX = 2**29  # 8192 patches of 256 px
TASK_BYTES = TASK_PX // 4  # of slide files: scanners write 0.17 (quality 30) to 0.5 bytes per px
SLIDE_BYTES = 2**18  # opening and identifying a slide and finding its tissue takes as long as tiling about 1 MPx
TASKS_PER_SLOT = 4  # so that slots end together although the estimate is rough


def group_slides(sizes: Sequence[int], slots: float) -> list[list[int]]:
    """Cut slides into groups, each for one task; the largest first, so that the last ones to end are short.

    Args:
        sizes: bytes of each slide's file.
        slots: tasks that run at a time.

    Returns:
        Places in `sizes`, each in one group. A group is below twice the portion, or a single slide.
    """
    costs = [size + SLIDE_BYTES for size in sizes]
    portion = min(TASK_BYTES, sum(costs) / (TASKS_PER_SLOT * slots))
    groups: list[list[int]] = []
    filled = portion
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        if filled >= portion:
            groups.append([])
            filled = 0
        groups[-1].append(place)
        filled += costs[place]
    return groups


def share_count(parts: int, patch_px: int) -> int:
    """Tasks that share a slide of so many parts; 1: it is tiled whole."""
    return max(1, round(parts * part_patches(patch_px) * patch_px**2 / TASK_PX))


def shares(parts: int, count: int) -> list[range]:
    """Cut `parts` into `count` runs whose lengths differ by one at most."""
    bounds = [parts * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
