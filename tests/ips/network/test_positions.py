from __future__ import annotations

import math

import pytest
import torch

from ips.network.positions import GridPositions, IndexPositions


def test_index_positions_are_the_papers_table() -> None:
    encoded = IndexPositions(6)(torch.tensor([0, 7]))
    expected = [[0.0, 1.0] * 3, []]
    for pair in range(3):
        angle = 7 / 10_000 ** (2 * pair / 6)
        expected[1] += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(encoded, torch.tensor(expected))


def test_grid_positions_encode_column_then_row() -> None:
    grid, line = GridPositions(12), IndexPositions(6)
    encoded = grid(torch.tensor([[[3.0, 70.0]], [[70.0, 3.0]]]))
    assert encoded.shape == (2, 1, 12)
    torch.testing.assert_close(encoded[0, 0], torch.cat((line(torch.tensor(3)), line(torch.tensor(70)))))
    torch.testing.assert_close(encoded[1, 0, :6], encoded[0, 0, 6:])


def test_a_position_has_one_code_whatever_its_company() -> None:
    positions = torch.randint(0, 9000, (301, 2)).float()
    grid = GridPositions(16)
    assert torch.equal(grid(positions)[17:18], grid(positions[17:18]))
    codes = {tuple(code) for code in grid(positions).tolist()}
    assert len(codes) == len({tuple(position) for position in positions.tolist()})


def test_widths_that_cannot_hold_pairs() -> None:
    with pytest.raises(ValueError, match="dim=7 is odd"):
        IndexPositions(7)
    with pytest.raises(ValueError, match="dim=6 must be a multiple of 4"):
        GridPositions(6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_round_the_code_not_the_angle(dtype: torch.dtype) -> None:
    index = torch.tensor([*range(600), 65_519, 70_000])
    codes = IndexPositions(32).to(dtype)(index)
    assert codes.dtype == dtype
    assert torch.equal(codes, IndexPositions(32)(index).to(dtype))
    assert len({tuple(code) for code in codes.tolist()}) == len(index)


def test_codes_have_the_modules_dtype() -> None:
    single, double = IndexPositions(6), IndexPositions(6).double()
    index = torch.tensor([3, 2**24 + 1])
    assert double(index).dtype == GridPositions(8).double()(torch.ones(1, 2)).dtype == torch.float64
    torch.testing.assert_close(double(index)[1, 0], torch.tensor(math.sin(2**24 + 1), dtype=torch.float64))
    assert single(index).dtype == torch.float32
    assert list(single.state_dict()) == ["index"]
