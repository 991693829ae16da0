from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import ks_2samp

from pipeline.inference.metrics import Bools, Floats
from pipeline.inference.permutation import kernel_distance, kolmogorov, permutation_test, total_variation


def _memberships(n: int) -> Bools:
    return np.random.default_rng(0).random((7, n)) < 0.3


def test_kolmogorovs_distance_is_scipys_with_ties_too() -> None:
    generator = np.random.default_rng(1)
    for values in (generator.standard_normal(61), generator.integers(0, 5, 61).astype(np.float64)):
        new = _memberships(61)
        found = kolmogorov(values)(new)
        expected = [ks_2samp(values[row], values[~row]).statistic for row in new]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_total_variation_is_half_the_difference_of_shares() -> None:
    words = ["a", "a", "b", "c", "c", "c", "b"]
    new = np.array([[True, True, True, False, False, False, False], [True, False, True, True, False, False, False]])
    np.testing.assert_allclose(total_variation(words)(new), [0.75, 1 / 6])
    apart = total_variation(["a", "a", "b", "b"])(np.array([[True, True, False, False]]))
    assert apart.tolist() == [1.0]


def test_the_kernels_distance_is_what_sums_over_pairs_say() -> None:
    vectors = np.random.default_rng(2).standard_normal((23, 5))
    new = _memberships(23)
    squared = np.array([[np.square(a - b).sum() for b in vectors] for a in vectors])
    kernel = np.exp(-squared / np.median(squared[~np.eye(23, dtype=np.bool_)]))
    for row, found in zip(new, kernel_distance(vectors)(new), strict=True):
        across, inside = kernel[row][:, ~row].mean(), kernel[row][:, row].mean() + kernel[~row][:, ~row].mean()
        assert found == pytest.approx(1 - 2 * across / inside, abs=1e-9)
    far = np.concatenate([np.zeros((9, 3)), np.full((14, 3), 1e3)]) + vectors[:, :3] * 1e-3
    assert kernel_distance(far)(np.arange(23)[None] < 9)[0] > 0.6


@pytest.mark.parametrize("make", [
    lambda x: kolmogorov(x[:, 0]), lambda x: total_variation([str(int(v > 0)) for v in x[:, 0]]), kernel_distance,
])  # fmt: skip
def test_p_is_small_where_sides_differ_and_uniform_where_they_do_not(
    make: Callable[[Floats], Callable[[Bools], Floats]],
) -> None:
    generator = np.random.default_rng(3)
    new = np.arange(60) < 20
    patients = [f"p{n}" for n in range(60)]
    x = generator.standard_normal((60, 4))
    x[new] += 2.5
    effect, p = permutation_test(make(x), new, patients, 0)
    assert p < 0.001
    assert effect > 0.3
    alike = [permutation_test(make(generator.standard_normal((60, 4))), new, patients, 0)[1] for _ in range(40)]
    assert 0.2 < float(np.mean(alike)) < 0.85
    assert sum(p < 0.05 for p in alike) <= 7


def test_slides_of_one_patient_are_dealt_together() -> None:
    """Sixty new slides of two patients are two, however alike they are."""
    values = np.concatenate([np.full(30, 2.0), np.full(30, 3.0), np.linspace(-1, 1, 20)])
    new = np.arange(80) < 60
    owners = ["a"] * 30 + ["b"] * 30 + [f"p{n}" for n in range(20)]
    effect, p = permutation_test(kolmogorov(values), new, owners, 0)
    assert effect == 1.0
    assert 0.001 < p < 0.05  # two of 22 are the largest by chance in one of 231
    assert permutation_test(kolmogorov(values), new, [f"p{n}" for n in range(80)], 0)[1] < 0.001
