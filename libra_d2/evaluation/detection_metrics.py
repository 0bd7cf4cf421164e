# SPDX-License-Identifier: Apache-2.0
"""AP in parts: by IoU, size, crowdedness, class and image, and what each type of error costs."""

from typing import Any, Dict, List, Optional

import numpy as np

from .detection_errors import ERROR_TYPES, SPECIAL_ERRORS, DetectionErrors, calibration
from .matching import IOU_THRESHOLDS, RANGES, Matches
from .ranking import Ranking

__all__ = ["ERROR_METRICS", "METRICS", "DetectionMetrics"]

#: the metrics that are AP50 lost to errors, in the order of their types
ERROR_METRICS = (*(f"{x} errors" for x in ERROR_TYPES[:-1]), "missed objects", *SPECIAL_ERRORS)
#: the names of :meth:`DetectionMetrics.values`
METRICS = (
    *("AP", *(f"AP{100 * x:.0f}" for x in IOU_THRESHOLDS), "AR"),
    *(f"AP {name}" for name in list(RANGES)[1:]),
    *ERROR_METRICS,
)


def _mean(values: np.ndarray, axes: int = 1, empty: float = np.nan) -> np.ndarray:
    """The mean over the last axes of shares that are not NaN, in percent."""
    axis = tuple(range(-axes, 0))
    num = np.sum(~np.isnan(values), axis=axis)
    total = np.nansum(values, axis=axis)
    return np.where(num > 0, 100 * total / np.maximum(num, 1), empty)


class DetectionMetrics:
    """
    AP, whose numbers are pycocotools', and where the rest is lost. All values are in percent.

    Attributes:
        matches: that it is computed from.
        errors: the :class:`DetectionErrors`.
    """

    def __init__(self, matches: Matches):
        self.matches = m = matches
        self.errors = DetectionErrors(matches)
        own = range(len(RANGES))
        self._parts = [self._ranking(i, m.detected_class, m.object_class) for i in own]
        self._mended = [self.errors.mended([x]) for x in (*ERROR_TYPES, *SPECIAL_ERRORS)]

    def _ranking(self, part: int, group: np.ndarray, object_group: np.ndarray) -> Ranking:
        m, status = self.matches, self.matches.status[part]
        return Ranking(
            *(group, m.score, m.image, status == 1, status >= 0),
            *(object_group, m.object_image, m.object_counts[part]),
        )

    def values(self, weights: Optional[np.ndarray] = None) -> np.ndarray:
        """
        The :data:`METRICS`; those of errors are the AP50 that fixing the errors of one type, and
        no others, would bring. NaN stands for no objects.

        Args:
            weights: (..., images), how many times each image counts, integers. Default: once.

        Returns:
            (..., metrics)
        """
        (ap, recall), *parts = (x.average_precision(weights) for x in self._parts)
        by_iou = _mean(ap)
        # Where no class is left, nothing is wrong any more.
        mended = [_mean(x.average_precision(weights)[0], 2, empty=100) for x in self._mended]
        columns = [
            *(_mean(ap, 2), *np.moveaxis(by_iou, -1, 0), _mean(recall, 2)),
            *(_mean(part, 2) for part, _ in parts),
            *(x - by_iou[..., 0] for x in mended),
        ]
        return np.stack(columns, axis=-1)

    def num_images(self) -> np.ndarray:
        """How many images have objects that count, for each of the :data:`METRICS`."""
        everywhere, *parts = (x.num_images for x in self._parts)
        num_before = METRICS.index("AR") + 1
        return np.array([everywhere] * num_before + parts + [everywhere] * len(ERROR_METRICS))

    def image_precision(self) -> np.ndarray:
        """(images,): AP of each image, which no other image has a share in; NaN without objects."""
        m, num_classes = self.matches, len(self.matches.class_ids)
        own, wanted = (
            image * num_classes + label
            for image, label in ((m.image, m.detected_class), (m.object_image, m.object_class))
        )
        ranking = self._ranking(0, own, wanted)
        ap, image = ranking.average_precision()[0].mean(0), ranking.groups // num_classes
        counts = np.bincount(image, minlength=len(m.image_ids))
        with np.errstate(invalid="ignore"):
            return 100 * np.bincount(image, ap, len(m.image_ids)) / counts

    def describe(self) -> Dict[str, Any]:
        """
        All numbers of the model, as plain values for JSON, with None for NaN:

        - "metrics": the :data:`METRICS` by name;
        - "errors": how many there are of each of :data:`ERROR_TYPES`;
        - "ranges": of each of :data:`RANGES` the number of "objects" and of those "missed", "AP"
          and "AR";
        - "classes": of each class with objects, by name, the number of "objects", "AP" and "AP50";
        - "calibration": see :func:`calibration`;
        - "images": of each image "image_id", "AP", and how many errors of each type it has.
        """
        m, counts = self.matches, self.errors.count()
        metrics = dict(zip(METRICS, self.values()))
        ranges = {}
        for name, objects, part in zip(RANGES, m.object_counts, self._parts):
            ap, recall = part.average_precision()
            num_missed = (objects & self.errors.missed).sum()
            row = {"objects": objects.sum(), "missed": num_missed, "AP": _mean(ap, 2)}
            ranges[name] = {**row, "AR": _mean(recall, 2)}
        ap = self._parts[0].average_precision()[0]
        num_objects = np.bincount(m.object_class[m.object_counts[0]])
        classes = {
            m.class_names[k]: {"objects": num_objects[k], "AP": _mean(x), "AP50": 100 * x[0]}
            for k, x in zip(self._parts[0].groups, ap.T)
        }
        images: List[Dict] = [
            {"image_id": image_id, "AP": ap, **dict(zip(ERROR_TYPES, row))}
            for image_id, ap, row in zip(m.image_ids, self.image_precision(), counts)
        ]
        return plain_values(
            {
                "metrics": metrics,
                "errors": dict(zip(ERROR_TYPES, counts.sum(0))),
                "ranges": ranges,
                "classes": classes,
                "calibration": calibration(m),
                "images": images,
            }
        )


def plain_values(value: Any) -> Any:
    """A nested value with Python's numbers instead of NumPy's, and None instead of NaN."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v) for v in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return None if isinstance(value, float) and np.isnan(value) else value
