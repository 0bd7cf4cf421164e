# SPDX-License-Identifier: Apache-2.0
"""
The gradient of the weights of 3x3 convolutions by Winograd's algorithm (arXiv 1509.09308).

It correlates the features with the gradient of the result. For tiles of 4 x 4 pixels of the latter
and 6 x 6 of the former, that takes 36 multiplications in place of 144: those of the tiles' values
as polynomials at the points 0, 1, -1, 2, -2 and infinity, in both directions.
"""

import torch
import torch.nn.functional as F

__all__ = ["weight_gradient"]

_TILE = 4
_NUM_POINTS = 6
# More tiles at once do not fit into the cache of a processor, with fewer, adding up takes longer.
_NUM_TILES = 128

_FEATURE_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_GRADIENT_TRANSFORM = (
    (1 / 4, 0, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6, 1 / 6),
    (1 / 24, 1 / 12, 1 / 6, 1 / 3),
    (1 / 24, -1 / 12, 1 / 6, -1 / 3),
    (0, 0, 0, 1),
)
_WEIGHT_TRANSFORM = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 1),
)


def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """
    Args:
        x: (N, C, H, W), not empty, what was convolved with stride 1 and padding 1.
        grad: (N, O, H, W), the gradient of the result.

    Returns:
        (O, C, 3, 3), the gradient of the weights. Its rounding errors are those of a convolution.
    """
    num_in, num_out = x.shape[1], grad.shape[1]
    height, width = x.shape[2:]
    matrices = (_FEATURE_TRANSFORM, _GRADIENT_TRANSFORM, _WEIGHT_TRANSFORM)
    of_features, of_gradient, of_weights = (torch.kron(m, m) for m in map(x.new_tensor, matrices))
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    rows_at_once = max(_NUM_TILES // columns, 1) * _TILE
    images_at_once = max(_NUM_TILES // (rows * columns), 1)
    right = columns * _TILE - width
    result = x.new_zeros(_NUM_POINTS**2, num_out, num_in)
    for images, grads in zip(x.split(images_at_once), grad.split(images_at_once)):
        for top in range(0, height, rows_at_once):
            strip = grads[:, :, top : top + rows_at_once]
            bottom = -strip.shape[2] % _TILE
            end = top + strip.shape[2] + bottom + 1  # a row of neighbors on either side
            pixels = images[:, :, max(top - 1, 0) : end]
            above, below = int(top == 0), max(end - height, 0)
            features = _tiles(F.pad(pixels, (1, right + 1, above, below)), _NUM_POINTS)
            gradients = _tiles(F.pad(strip, (0, right, 0, bottom)), _TILE)
            at_points = (of_gradient @ gradients).view(len(result), -1, num_out)
            features_at_points = (of_features @ features).view(len(result), -1, num_in)
            result.baddbmm_(at_points.transpose(1, 2), features_at_points)
    result = (of_weights @ result.flatten(1)).view(3, 3, num_out, num_in)
    return result.permute(2, 3, 0, 1).contiguous()


def _tiles(x: torch.Tensor, size: int) -> torch.Tensor:
    """
    The values of each pixel of the tiles that begin in each fourth row and column.

    Args: x: (N, C, H, W).

    Returns: (size * size, number of tiles * C).
    """
    tiles = x.permute(0, 2, 3, 1).unfold(1, size, _TILE).unfold(2, size, _TILE)
    return tiles.permute(4, 5, 0, 1, 2, 3).reshape(size * size, -1)
