# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pycocotools.mask as mask_utils
import pytest

from libra_d2.data.run_lengths import check_run_lengths


@pytest.mark.parametrize("seed", range(5))
def test_valid_masks(seed):
    """Its masks of any size are accepted, compressed or not, if the lengths add up to the size."""
    rng = np.random.default_rng(seed)
    height, width = (int(x) for x in rng.integers(1, 90, 2))
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    text = mask_utils.encode(np.asfortranarray(mask))["counts"].decode()
    # Column after column, beginning with zeros.
    changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0))
    runs = np.diff(changes, prepend=0, append=mask.size).tolist()
    for counts in (text, runs):
        check_run_lengths({"size": [height, width], "counts": counts}, height, width)
        with pytest.raises(ValueError, match=f"up to {mask.size}, not to {height} x {width + 1}"):
            check_run_lengths({"size": [height, width + 1], "counts": counts}, height, width + 1)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [12]}, "must have 'counts' and the size"),
        ({"size": [4, 3], "counts": [12]}, "the size \\[3, 4\\]"),
        ({"size": [3, 4]}, "must have 'counts'"),
        ({"size": [3, 4], "counts": [13, -1]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [6.0, 6.0]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [True, 11]}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": [11]}, "add up to 11, not to 3 x 4"),
        ({"size": [3, 4], "counts": 12}, "integers of 0 or more"),
        ({"size": [3, 4], "counts": "\u00e9"}, "is no run length"),
        ({"size": [3, 4], "counts": "P"}, "cut short"),
        ({"size": [3, 4], "counts": "ooooooo0"}, "'0' in its counts is no run length"),
        ({"size": [3, 4], "counts": "oooooo0"}, f"add up to {2**30 - 1}, not to 3 x 4"),
        ({"size": [3, 4], "counts": "p"}, "'p' in its counts is no run length"),
        ({"size": [3, 4], "counts": "/"}, "'/' in its counts is no run length"),
        *(({"size": [3, 4], "counts": c}, f"up to {n},") for c, n in (("0", 0), ("_0", 15))),
        # 5, 1, 2, and differences to the number before the last: 1 + 2, 2 - 1 and 3 + 31.
        ({"size": [3, 4], "counts": "5122Oo0"}, "add up to 46, not to 3 x 4"),
        ({"size": [3, 4], "counts": "@"}, "integers of 0 or more"),
    ],
)
def test_broken(segmentation, message):
    with pytest.raises(ValueError, match=message):
        check_run_lengths(segmentation, 3, 4)
