# SPDX-License-Identifier: Apache-2.0
"""Checks of COCO's run-length masks, which pycocotools decodes without any."""

from typing import Any, List

__all__ = ["check_run_lengths"]


def _decode(text: str) -> List[int]:
    """
    The run lengths in compressed form: each character minus "0" is five bits and a continuation
    bit; from the fourth number on, differences to the one before the last are stored.
    """
    counts: List[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError(f"{character!r} in its counts is no run length")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("its counts are cut short")
    return counts


def check_run_lengths(segmentation: Any, height: int, width: int) -> None:
    """
    Raises:
        ValueError: unless the mask, a dict of "size", [height, width], and "counts", a list or
            compressed text, is valid for an image of that size.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width] or not counts:
        raise ValueError(f"its run-length mask must have 'counts' and the size {[height, width]}")
    if type(counts) is str:
        counts = _decode(counts)
    if type(counts) is not list or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its run lengths must be integers of 0 or more")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)}, not to {height} x {width}")
