"""The squares of regions that occlusion importance hides. Needs neither torch nor transformers."""

import numpy as np

WINDOW = 3  # regions: side of the hidden square
SMALL_GRID = 5  # regions: on a grid with a smaller side, that square would hide most of the image


def hidden_squares(grid: tuple[int, int], window: int | None = None) -> np.ndarray:
    """For each of the N regions of a grid (H, W), the regions that the square around it covers.

    Args:
        window: side of the square, an odd number of regions. Default: 3, or 1 on a grid with fewer than 5 rows or columns.

    Returns:
        (N, N) bool.

    Raises:
        ValueError: `window` is even or below 1.
    """
    if window is None:
        window = WINDOW if min(grid) >= SMALL_GRID else 1
    if window < 1 or window % 2 == 0:
        raise ValueError(f"`window` is {window}, but it must be an odd number of regions, at least 1.")
    y, x = (axis.ravel() for axis in np.indices(grid))  # (N), (N)
    reach = window // 2
    return (abs(y[:, None] - y) <= reach) & (abs(x[:, None] - x) <= reach)
