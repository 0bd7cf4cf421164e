# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision, computed by the fastest evaluator available."""

import contextlib
import importlib.util
import io
import json
import logging
import os
from itertools import chain
from typing import Any, Callable, Dict, List, Optional, Sequence

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm

from ..utils.atomic_write import atomic_write

__all__ = ["LibraCOCOEvaluator"]

logger = logging.getLogger(__name__)

COCO_MAX_DETS = 100  # detections per image that COCO's AP counts


def _faster_coco_eval(coco_gt, coco_dt, iou_type: str):
    """faster-coco-eval's evaluator for pycocotools' objects."""
    from faster_coco_eval import COCO, COCOeval_faster

    def convert(coco):
        converted = COCO()
        converted.dataset = coco.dataset
        converted.createIndex()
        return converted

    return COCOeval_faster(convert(coco_gt), convert(coco_dt), iou_type, print_function=logger.info)


def choose_coco_eval() -> Callable:
    """
    Detectron2's compiled evaluator, or else faster-coco-eval, or else pycocotools, as a function of
    ground truth, detections and IoU type. All give the same numbers.
    """
    compiled = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    if compiled is not COCOeval:
        return compiled
    if importlib.util.find_spec("faster_coco_eval") is not None:
        return _faster_coco_eval
    logger.info(
        "Evaluating with pycocotools; `pip install faster-coco-eval` gives the same numbers faster."
    )
    return COCOeval


def _numbers(ids: List[Any]) -> Dict[Any, int]:
    """Maps ids, in ascending order, to 1, 2, ..."""
    return {id: number for number, id in enumerate(sorted(ids), 1)}


class LibraCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` with a choice of the implementation, and with AP of as many detections
    per image as the model may return. The numbers are pycocotools'.

    Implementations take an annotation with id 0 for unmatched, or store ids in 32 or 53 bits.
    Therefore all ids are renumbered from 1 on internally; files have the ids of the dataset.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Optional[Sequence[str]] = None,
        distributed: bool = True,
        output_dir: Optional[str] = None,
        *,
        max_dets_per_image: int = COCO_MAX_DETS,
        coco_eval: Optional[Callable] = None,
    ):
        """
        Args:
            dataset_name, tasks, distributed, output_dir: see :class:`COCOEvaluator`.
            max_dets_per_image: how many detections of an image count, those with the highest
                scores. COCO's AP and AR are those with 100.
            coco_eval: the implementation. Default: :func:`choose_coco_eval`.
        """
        has_json = MetadataCatalog.get(dataset_name).get("json_file") is not None
        if not has_json and output_dir:
            # The parent would take a dataset that it has converted before, of other data perhaps.
            if comm.is_main_process():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(output_dir, f"{dataset_name}_coco_format.json"))
            comm.synchronize()
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=max_dets_per_image
        )
        if not has_json:
            del self._metadata.json_file
        self._coco_eval = coco_eval or choose_coco_eval()
        dataset = self._coco_api.dataset
        self._images = _numbers([image["id"] for image in dataset["images"]])
        self._categories = _numbers([category["id"] for category in dataset["categories"]])
        self._class_ids = sorted(self._categories)
        self._renumbered = COCO()
        self._renumbered.dataset = {
            "images": [{**x, "id": self._images[x["id"]]} for x in dataset["images"]],
            "categories": [{"id": number} for number in self._categories.values()],
            "annotations": [
                {
                    "iscrowd": 0,  # LVIS has none
                    **annotation,
                    "id": number,
                    "image_id": self._images[annotation["image_id"]],
                    "category_id": self._categories[annotation["category_id"]],
                }
                for number, annotation in enumerate(dataset.get("annotations", []), 1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self._renumbered.createIndex()

    def _eval_predictions(
        self, predictions: List[Dict[str, Any]], img_ids: Optional[List] = None
    ) -> None:
        """The parent does not take other implementations; it is used for keypoints."""
        results = list(chain.from_iterable(x["instances"] for x in predictions))
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        if "keypoints" in tasks or not results or not self._do_evaluation:
            super()._eval_predictions(predictions, img_ids)
            return
        # Classes are in the order of their ids, also in LVIS datasets, which lack Detectron2's map.
        for result in results:
            result["category_id"] = self._class_ids[result["category_id"]]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with atomic_write(path, "w") as f:
                json.dump(results, f)
        names = self._metadata.get("thing_classes")
        for task in tasks:
            evaluated = self._evaluate(results, task, img_ids)
            self._results[task] = self._derive_coco_results(evaluated, task, class_names=names)

    def _evaluate(self, results: List[Dict[str, Any]], task: str, img_ids: Optional[List]):
        """Evaluate detections in COCO's format; returns the evaluator."""
        # Without the boxes, pycocotools takes the area of an object from its mask.
        shape = "segmentation" if task == "segm" else "bbox"
        results = [
            {
                "image_id": self._images[result["image_id"]],
                "category_id": self._categories[result["category_id"]],
                "score": result["score"],
                shape: result[shape],
            }
            for result in results
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            detections = self._renumbered.loadRes(results)
        coco_eval = self._coco_eval(self._renumbered, detections, task)
        coco_eval.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            coco_eval.params.imgIds = [self._images[id] for id in img_ids]
        coco_eval.evaluate()
        coco_eval.accumulate()
        if self._max_dets_per_image[-1] == COCO_MAX_DETS:
            coco_eval.summarize()
        else:
            COCOevalMaxDets.summarize(coco_eval)  # COCO's summary requires a limit of 100
        return coco_eval
