# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision from matches, again and again with other weights of the images."""

from typing import Optional, Tuple

import numpy as np

__all__ = ["Ranking"]

_RECALLS = np.linspace(0, 1, 101)  # where COCO samples the precision


def _sums_before(values: np.ndarray) -> np.ndarray:
    """(..., N + 1) sums of the integers before each one of (..., N), and of all."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1), dtype=int)
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


class Ranking:
    """
    Detections in the order in which average precision counts them, for one or several rows, such as
    IoU thresholds. They are sorted once, so that AP is fast for other weights of the images, such
    as those of bootstrap samples.
    """

    def __init__(
        self,
        group: np.ndarray,
        score: np.ndarray,
        image: np.ndarray,
        is_true: np.ndarray,
        counts: np.ndarray,
        object_group: np.ndarray,
        object_image: np.ndarray,
        object_counts: np.ndarray,
        removed: Optional[np.ndarray] = None,
    ):
        """
        Args:
            group: (D,), what AP is computed of, for each detection: its class.
            score: (D,). Of equal scores, the first one comes first.
            image: (D,), position of the image of each detection.
            is_true: (rows, D) of bool, true positives.
            counts: (rows, D) of bool, true and false positives; others are ignored.
            object_group, object_image: (G,), as those of the detections.
            object_counts: (G,) of bool, the objects that must be found.
            removed: (G,) of bool, those of them that are taken for absent. A group left without
                objects has an AP of 0 if it has detections that count, and else none.
        """
        kept = np.flatnonzero(object_counts)
        kept = kept[np.argsort(object_group[kept], kind="stable")]
        #: (N,) the groups that have objects, ascending
        self.groups, starts = np.unique(object_group[kept], return_index=True)
        self._object_image, self._object_ends = object_image[kept], np.append(starts, len(kept))
        self._remains = np.ones(len(kept), dtype=bool) if removed is None else ~removed[kept]
        #: how many images have objects that count
        self.num_images = len(np.unique(self._object_image))

        order = np.flatnonzero(counts.any(0) & np.isin(group, self.groups))
        order = order[np.lexsort((-score[order], group[order]))]
        groups = np.searchsorted(self.groups, group[order])
        self._image, self._counts = image[order], counts[:, order]
        self._ends = np.searchsorted(groups, np.arange(len(self.groups) + 1))
        # Precision is highest at true positives, and AP looks at no others.
        self._columns = np.flatnonzero(is_true[:, order].any(0))
        self._is_true = is_true[:, order[self._columns]]
        self._group = groups[self._columns]
        self._which, self._first = np.unique(self._group, return_index=True)
        self._start = self._first[np.searchsorted(self._which, self._group)]

    def average_precision(
        self, weights: Optional[np.ndarray] = None
    ) -> Tuple[np.ndarray, np.ndarray]:
        """
        Args:
            weights: (..., images), how many times each image of the dataset counts, integers.
                Default: once. Several samples at a time are faster than one after the other.

        Returns:
            AP, and the recall of all detections: (..., rows, N) in 0 to 1, for the N
            :attr:`groups`. NaN stands for no objects.
        """
        if weights is None:
            images = np.concatenate([[0], self._image, self._object_image])
            weights = np.ones(1 + int(images.max()), dtype=int)
        weights = weights[..., None, :]  # for the rows
        objects = weights[..., self._object_image]
        present, positives = (
            np.diff(_sums_before(x)[..., self._object_ends], axis=-1)
            for x in (objects, objects * self._remains)
        )
        seen = _sums_before(self._counts * weights[..., self._image])
        left = np.diff(seen[..., self._ends], axis=-1) > 0
        ap, recall = np.zeros((2, *left.shape))
        if len(self._columns):
            gained = self._is_true * weights[..., self._image[self._columns]]
            hits = np.cumsum(gained, axis=-1)
            hits -= (hits - gained)[..., self._start]
            before = seen[..., self._ends[self._group]]
            precision = hits / (seen[..., self._columns + 1] - before + np.spacing(1))
            share = hits / np.maximum(positives, 1)[..., self._group]
            # How many of the recalls are reached here, and were not before in the group.
            reached = np.searchsorted(_RECALLS, share, side="right")
            new = np.diff(reached, axis=-1, prepend=0)
            new[..., self._first] = reached[..., self._first]
            # The highest precision from here on in the group: complex numbers are compared by their
            # real part first, which is larger in groups that come earlier.
            keyed = (precision * 1j - self._group)[..., ::-1]
            highest = np.maximum.accumulate(keyed, axis=-1)[..., ::-1].imag
            total = np.add.reduceat(highest * new, self._first, axis=-1)
            ap[..., self._which] = total / len(_RECALLS)
            recall[..., self._which] = np.maximum.reduceat(share, self._first, axis=-1)
        undefined = (present == 0) | ((positives == 0) & ~left)
        return np.where(undefined, np.nan, ap), np.where(undefined, np.nan, recall)
