from __future__ import annotations

import hashlib
from dataclasses import replace

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st

from pipeline.bags.augment import Augment, Changes, joined, oriented


def test_stain_factors_and_shifts_are_even_within_their_strength() -> None:
    found = Augment(0, 0, "a", stain=0.3).stains(np.arange(20_000)).astype(np.float64) - [[[1.0], [0.0]]]
    assert found.shape == (20_000, 2, 3)
    assert np.abs(found).max() <= 0.3 + 1e-6
    flat = found.reshape(-1, 6)
    assert np.abs(flat.mean(axis=0)).max() < 0.006  # sd of a mean 0.0012
    assert np.abs(flat.std(axis=0) - 0.3 / np.sqrt(3)).max() < 0.003
    assert np.abs(np.corrcoef(flat.T) - np.eye(6)).max() < 0.04
    alone = Augment(0, 0, "a", stain=0.3).stains(np.array([17])).astype(np.float64) - [[[1.0], [0.0]]]
    assert np.array_equal(alone[0], found[17])


def test_the_eight_orientations_differ_and_keep_the_pixels() -> None:
    patch = torch.arange(3 * 7 * 7, dtype=torch.uint8).view(3, 7, 7)
    found = {oriented(patch, code).contiguous().numpy().tobytes() for code in range(8)}
    assert len(found) == 8
    assert {bytes(sorted(pixels)) for pixels in found} == {bytes(sorted(patch.numpy().tobytes()))}


def test_changes_leave_what_was_read_as_it_was() -> None:
    patches = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).view(2, 3, 5, 5)
    before = patches.clone()
    assert not torch.equal(Changes(np.array([0, 3]), None)(patches), before)
    assert torch.equal(patches, before)


keys = st.builds(Augment, st.integers(0, 2**40), st.integers(0, 1000), st.text("0123456789abcdef", max_size=32))


@hypothesis.given(augment=keys, rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
@hypothesis.settings(max_examples=100, deadline=None)
def test_codes_are_a_pure_function_of_the_row(augment: Augment, rows: list[int]) -> None:
    codes = augment.codes(np.array(rows))
    assert codes.tolist() == [int(replace(augment).codes(np.array([row]))[0]) for row in rows]
    assert set(codes.tolist()) <= set(range(8))


def test_codes_are_splitmix64_of_a_keyed_counter() -> None:
    mask = 2**64 - 1

    def code(row: int) -> int:
        z = int.from_bytes(hashlib.blake2b(b"5/7/ab", digest_size=8).digest(), "little") + row + 0x9E3779B97F4A7C15
        z &= mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (z ^ z >> 31) & 7

    assert Augment(5, 7, "ab").codes(np.arange(1000)).tolist() == [code(row) for row in range(1000)]


def test_codes_are_even_and_independent() -> None:
    rows = np.arange(80_000)
    base = Augment(0, 0, "a").codes(rows)
    assert np.abs(np.bincount(base, minlength=8) - 10_000).max() < 400  # 4 standard deviations
    for other in (Augment(1, 0, "a"), Augment(0, 1, "a"), Augment(0, 0, "b")):
        assert abs((other.codes(rows) == base).mean() - 1 / 8) < 0.005
    assert abs((base[1:] == base[:-1]).mean() - 1 / 8) < 0.005


def test_changes_of_several_slides_go_to_their_places() -> None:
    rows, at = np.array([4, 9, 2]), (np.array([3, 0, 2]), np.array([1]))
    parts = [Augment(1, 2, "a", stain=0.1).changes(rows), Augment(1, 2, "b", stain=0.1).changes(np.array([7]))]
    whole = joined(list(zip(at, parts, strict=True)))
    for places, part in zip(at, parts, strict=True):
        assert whole.codes[places].tolist() == part.codes.tolist()
        assert whole.stains is not None
        assert part.stains is not None
        assert np.array_equal(whole.stains[places], part.stains)
    assert joined([(at[1], Augment(1, 2, "b").changes(np.array([7])))]).stains is None


def test_surroundings_are_changed_as_their_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    patches, around = (torch.randint(0, 256, (40, 3, 7, 7), dtype=torch.uint8, generator=generator) for _ in range(2))
    for augment in (Augment(1, 2, "a"), Augment(1, 2, "a", stain=0.2)):
        changes = augment.changes(np.arange(40))
        found = changes(torch.cat([patches, around], dim=2))
        assert torch.equal(found, torch.cat([changes(patches), changes(around)], dim=2))
