# SPDX-License-Identifier: Apache-2.0
"""LVIS' average precision, by faster-coco-eval."""

import importlib.util
from typing import Any, Dict, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO

from ..errors import InputError
from .coco_evaluator import LibraCOCOEvaluator, faster_coco_eval
from .detections import Detections

__all__ = ["LVIS_AP_OF_FREQUENCIES", "LibraLVISEvaluator", "has_lvis_metrics"]

LVIS_MAX_DETS = 300  # detections per image that LVIS' AP counts
#: By how many images of the training set have a class: fewer than 10, fewer than 100, more.
LVIS_AP_OF_FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}
_REQUIRED = {
    "images": ("neg_category_ids", "not_exhaustive_category_ids"),
    "categories": ("frequency",),
}


def _lvis_eval(truth: COCO, detections: COCO, task: str) -> Any:
    """LVIS' evaluator. As in the package lvis, what has no area does not count: empty masks."""
    for coco in (truth, detections):
        annotations = coco.dataset["annotations"]
        coco.dataset["annotations"] = [x for x in annotations if x["area"] > 0]
    return faster_coco_eval(truth, detections, task, lvis_style=True)


def has_lvis_metrics() -> bool:
    """Whether :class:`LibraLVISEvaluator` can be used."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class LibraLVISEvaluator(LibraCOCOEvaluator):
    """
    LVIS' metrics. They differ from COCO's in what counts in an image:

    - the 300 detections with the highest scores, of all classes together;
    - only those of classes with objects in the image or in its ``neg_category_ids``, as others may
      be in the image without an annotation;
    - of classes in its ``not_exhaustive_category_ids``, only those that find an object.

    There are also APr, APc and APf of rare, common and frequent classes.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Optional[Sequence[str]] = None,
        distributed: bool = True,
        output_dir: Optional[str] = None,
    ):
        """
        Args:
            dataset_name, tasks, distributed, output_dir: see :class:`LVISEvaluator`.

        Raises:
            InputError: if an image or a category of the dataset lacks what LVIS adds to COCO.
        """
        options = {"max_dets_per_image": LVIS_MAX_DETS, "coco_eval": _lvis_eval}
        super().__init__(dataset_name, tasks, distributed, output_dir, **options)

    def _read_dataset(self, dataset: Dict[str, Any]) -> None:
        """See the parent."""
        super()._read_dataset(dataset)
        for kind, keys in _REQUIRED.items():
            for entry, key in ((x, key) for x in dataset[kind] for key in keys):
                if key not in entry:
                    raise InputError(
                        f"{self._metadata.json_file}: {kind}: id {entry['id']} has no {key}, which "
                        "LVIS' metrics need; for COCO's, set the dataset's evaluator_type to 'coco'"
                    )
        # What is known of an image: the classes that were looked for, as contiguous ids.
        known = {x["id"]: {*x["neg_category_ids"]} for x in dataset["images"]}
        for annotation in dataset.get("annotations", []):
            if annotation["area"] > 0:
                known[annotation["image_id"]].add(annotation["category_id"])
        self._known = {
            image_id: np.array([self._categories[id] - 1 for id in ids], dtype=np.int32)
            for image_id, ids in known.items()
        }
        for entry in self._image_entries:
            for key in _REQUIRED["images"]:
                entry[key] = [self._categories[id] for id in entry[key]]
        frequencies = {x["id"]: x["frequency"] for x in dataset["categories"]}
        self._frequencies = np.array([frequencies.get(id, "") for id in self._class_ids])
        for entry, frequency in zip(self._category_entries, self._frequencies):
            entry["frequency"] = frequency

    def _counted(self, detections: Detections) -> np.ndarray:
        """See the parent. The best are chosen first, also of classes that are not known."""
        best = np.sort(np.argsort(-detections.scores, kind="stable")[:LVIS_MAX_DETS])
        return best[np.isin(detections.classes[best], self._known[detections.image_id])]

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Optional[Sequence[str]] = None
    ) -> Dict[str, float]:
        """See the parent; LVIS has AP of frequencies, but not of each class."""
        results = super()._derive_coco_results(coco_eval, iou_type)
        for frequency, name in LVIS_AP_OF_FREQUENCIES.items():
            results[name] = float("nan")
            if coco_eval is not None:
                precision = coco_eval.eval["precision"][:, :, self._frequencies == frequency, 0, -1]
                precision = precision[precision > -1]
                results[name] = float(100 * precision.mean()) if precision.size else float("nan")
        return results
