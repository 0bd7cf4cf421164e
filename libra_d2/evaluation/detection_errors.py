# SPDX-License-Identifier: Apache-2.0
"""
The errors of a detector as TIDE (Bolya et al., arXiv:2008.08115) defines them, and its AP in parts.

Every false positive at an IoU of 0.5 has one type, the first of these that fits:

1. localization: it overlaps an object of its class by 0.1 to 0.5;
2. classification: it overlaps an object of another class by 0.5 or more;
3. duplicate: it overlaps an object of its class by 0.5 or more, which a better one has found;
4. background: it overlaps no object by more than 0.1;
5. both: all others, of the wrong class and badly located.

Objects that nothing finds are missed, unless a localization or classification error, mended, would
find them. Mending gives such an error the box or the class of its object, or takes it away if the
object is found already or has an error with a higher score; it takes away errors of the other
types, and missed objects.

The package tidecv differs where COCO's evaluation does: it lets the 100 best detections of an image
count, not of each class in an image; it mends false positives in crowd regions, which are ignored
here; and classes without objects have an AP of 0. Among equal scores, its order is another.
"""

from typing import Any, Dict, Sequence

import numpy as np

from .matching import Matches
from .ranking import Ranking

__all__ = ["ERROR_TYPES", "SPECIAL_ERRORS", "DetectionErrors", "calibration"]

#: of false positives, by number; and of objects
ERROR_TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
_CLS, _LOC, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(6)
#: all errors at once: detections that find nothing, and objects that nothing finds
SPECIAL_ERRORS = ("false positives", "false negatives")
_FOREGROUND, _UNRELATED = 0.5, 0.1  # IoU


class DetectionErrors:
    """
    What is wrong with each detection and object of :class:`Matches`.

    Attributes:
        kind: (D,), number of the type in :data:`ERROR_TYPES`, or -1 if a detection is right or does
            not count.
        target: (D,), the object of a localization or classification error, or -1.
        mends: (D,) of bool, the detections that would find their object if they were mended.
        found, missed: (G,) of bool, the objects that are found at an IoU of 0.5, or missed.
    """

    def __init__(self, matches: Matches):
        self.matches = m = matches
        own, other = m.nearest_iou
        rules = {
            _LOC: (own >= _UNRELATED) & (own <= _FOREGROUND),
            _CLS: other >= _FOREGROUND,
            _DUPLICATE: own >= _FOREGROUND,
            _BACKGROUND: np.maximum(own, other) <= _UNRELATED,
        }
        kind = np.select(list(rules.values()), list(rules), _BOTH)
        self.kind = np.where(m.status[0, 0] == 0, kind, -1)
        self.target = np.select([self.kind == _LOC, self.kind == _CLS], m.nearest, -1)
        objects = np.arange(len(m.object_ids))
        self.found = m.finders() >= 0
        # Detections of an image are sorted by score: the first one of an object is its best.
        wanted, first = np.unique(self.target, return_index=True)
        usable = np.isin(wanted, objects[~self.found])
        self.mends = np.isin(np.arange(len(self.kind)), first[usable])
        self.missed = m.object_counts[0] & ~self.found & ~np.isin(objects, wanted)

    def count(self) -> np.ndarray:
        """(images, 6): how many errors of each of :data:`ERROR_TYPES` there are."""
        m, num_images = self.matches, len(self.matches.image_ids)
        images = [m.image[self.kind == kind] for kind in range(_MISSED)]
        images.append(m.object_image[self.missed])
        return np.stack([np.bincount(x, minlength=num_images) for x in images], axis=1)

    def mended(self, types: Sequence[str]) -> Ranking:
        """
        The ranking at an IoU of 0.5 without the errors of some types, which may be special ones.
        """
        m, chosen = self.matches, np.array([x in types for x in (*ERROR_TYPES, None)])
        is_chosen = chosen[self.kind]  # -1 is the last
        is_true = (m.status[0, 0] == 1) | (is_chosen & self.mends)
        counts = (m.status[0, 0] >= 0) & (is_true | ~is_chosen)
        label, absent = m.detected_class.copy(), self.missed & chosen[_MISSED]
        wrong = is_chosen & (self.kind == _CLS)
        label[wrong] = m.object_class[self.target[wrong]]
        if SPECIAL_ERRORS[0] in types:
            counts = is_true
        if SPECIAL_ERRORS[1] in types:
            absent = ~self.found
        return Ranking(
            *(label, m.score, m.image, is_true[None], counts[None]),
            *(m.object_class, m.object_image, m.object_counts[0], absent),
        )


def calibration(*runs: Matches, num_bins: int = 10) -> Dict[str, Any]:
    """
    Do scores say how often a detection is right, at an IoU of 0.5? Of several runs, the detections
    of all are taken together.

    Returns:
        "expected calibration error", in percent: how far score and precision are apart, on average
        over the detections, in "bins" of equal width, each with its "detections", mean "score" and
        "precision", both in percent. Empty if a score is not in 0 to 1, or there are none.
    """
    status = np.concatenate([x.status[0, 0] for x in runs])
    score = np.concatenate([x.score for x in runs])[status >= 0]
    is_true = status[status >= 0] == 1
    if not len(score) or score.min() < 0 or score.max() > 1:
        return {}
    bins = np.minimum((score * num_bins).astype(int), num_bins - 1)
    filled, counts = np.unique(bins, return_counts=True)
    means = [100 * np.bincount(bins, x)[filled] / counts for x in (score, is_true)]
    error = float(np.abs(means[0] - means[1]) @ counts / len(score))
    rows = zip(counts.tolist(), *(x.tolist() for x in means))
    names = ("detections", "score", "precision")
    return {"expected calibration error": error, "bins": [dict(zip(names, row)) for row in rows]}
