# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pycocotools.mask as mask_utils
import pytest

from libra_d2.data.run_lengths import _decode, check_run_lengths


@pytest.mark.parametrize("seed", range(20))
def test_what_pycocotools_writes(seed):
    """Masks of any size are taken, compressed or not, and the lengths add up."""
    rng = np.random.default_rng(seed)
    height, width = (int(x) for x in rng.integers(1, 90, 2))
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    encoded = mask_utils.encode(np.asfortranarray(mask))
    text = encoded["counts"].decode()
    check_run_lengths({"size": [height, width], "counts": text}, height, width)
    counts = _decode(text)
    flat, runs = mask.flatten(order="F"), []
    value = 0
    while len(flat):
        ends = np.flatnonzero(flat != value)
        length = int(ends[0]) if len(ends) else len(flat)
        runs.append(length)
        flat, value = flat[length:], 1 - value
    assert counts == runs
    check_run_lengths({"size": [height, width], "counts": runs}, height, width)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [12]}, "must have 'counts' and the size"),
        ({"size": [4, 3], "counts": [12]}, "the size \\[3, 4\\]"),
        ({"size": [3, 4]}, "must have 'counts'"),
        ({"size": [3, 4], "counts": []}, "must have 'counts'"),
        ({"size": [3, 4], "counts": [13, -1]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [6.0, 6.0]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [True, 11]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [11]}, "add up to 11, not to 3 x 4"),
        ({"size": [3, 4], "counts": [2**70]}, "add up to"),
        ({"size": [3, 4], "counts": 12}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": "\u00e9"}, "is no run length"),
        ({"size": [3, 4], "counts": " "}, "is no run length"),
        ({"size": [3, 4], "counts": "P"}, "cut short"),
        ({"size": [3, 4], "counts": "oooooooooo"}, "is no run length"),
        ({"size": [3, 4], "counts": "@"}, "integers of 0 or more"),
    ],
)
def test_broken(segmentation, message):
    with pytest.raises(ValueError, match=message):
        check_run_lengths(segmentation, 3, 4)
