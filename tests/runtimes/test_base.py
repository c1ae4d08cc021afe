from __future__ import annotations

import numpy as np
import pytest

from himix_edge.runtimes.base import in_parts


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [
        (1, 4, [1]),
        (4, 4, [4]),
        (5, 4, [3, 2]),
        (6, 4, [4, 2]),
        (9, 4, [4, 3, 2]),
        (13, 4, [4, 4, 3, 2]),
        (3, 2, [2, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_no_token_is_left_over_for_a_part_of_its_own(
    count: int, most: int, sizes: list[int]
) -> None:
    ids = np.arange(2 * count).reshape(2, count)
    parts = list(in_parts(ids, most))
    assert [part.shape[1] for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), ids)
