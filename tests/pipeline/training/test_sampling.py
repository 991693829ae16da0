from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.sampling import balanced_slides

classes = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=40)


@given(classes, st.integers(0, 3), st.integers(0, 9))
def test_classes_come_alike_and_their_slides_too(numbers: list[float], seed: int, epoch: int) -> None:
    drawn = balanced_slides(numbers, seed, epoch)
    assert len(drawn) == len(numbers)
    names = [str(number) for number in numbers]
    by_class = Counter(dict.fromkeys(names, 0))
    by_class.update(names[index] for index in drawn)
    assert max(by_class.values()) - min(by_class.values()) <= 1
    for name in set(names):
        times = Counter({index: 0 for index, other in enumerate(names) if other == name})
        times.update(index for index in drawn if names[index] == name)
        assert max(times.values()) - min(times.values()) <= 1
    assert drawn == balanced_slides(numbers, seed, epoch)


def test_frequent_classes_take_turns_until_all_had_theirs() -> None:
    numbers = [0.0] * 12 + [1.0] * 4
    epochs = [balanced_slides(numbers, 0, epoch) for epoch in range(3)]
    seen = Counter(index for drawn in epochs for index in drawn)
    assert {seen[index] for index in range(12)} == {2}
    assert {seen[index] for index in range(12, 16)} == {6}
    assert balanced_slides(numbers, 1, 0) != epochs[0]
