# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision, computed by the fastest evaluator available."""

import contextlib
import copy
import importlib.util
import io
import logging
import os
from itertools import chain
from operator import itemgetter
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm

from ..utils.main_process import in_main_process
from .detections import (
    Detections,
    gather_predictions,
    write_predictions,
    write_results_json,
)

__all__ = ["LibraCOCOEvaluator"]

logger = logging.getLogger(__name__)

COCO_MAX_DETS = 100  # detections per image that COCO's AP counts
_GROUP = 50_000  # detections, and classes in images, that are evaluated at once


def faster_coco_eval(coco_gt, coco_dt, iou_type: str, **options):
    """faster-coco-eval's evaluator for pycocotools' objects."""
    from faster_coco_eval import COCO, COCOeval_faster

    def convert(coco):
        converted = COCO()
        converted.dataset = coco.dataset
        converted.createIndex()
        return converted

    options["print_function"] = print
    return COCOeval_faster(convert(coco_gt), convert(coco_dt), iou_type, **options)


def choose_coco_eval() -> Callable:
    """
    Detectron2's compiled evaluator, or else faster-coco-eval, or else pycocotools, as a function of
    ground truth, detections and IoU type. All give the same numbers.
    """
    compiled = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    if compiled is not COCOeval:
        return compiled
    if importlib.util.find_spec("faster_coco_eval") is not None:
        return faster_coco_eval
    logger.info(
        "Evaluating with pycocotools; `pip install faster-coco-eval` gives the same numbers faster."
    )
    return COCOeval


class LibraCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` with a choice of the implementation, and with AP of as many detections
    per image as the model may return. The numbers are pycocotools'.

    Implementations take an annotation with id 0 for unmatched, or store ids in 32 or 53 bits.
    Therefore all ids are renumbered from 1 on internally; files have the ids of the dataset.

    Processes other than the main one hand their predictions to it, and do not read the dataset.
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
        # What the parent has without a dataset.
        self._logger, self._metadata = logger, MetadataCatalog.get(dataset_name)
        self._tasks, self._distributed, self._output_dir = tasks, distributed, output_dir
        self._cpu_device = torch.device("cpu")
        self._coco_eval = coco_eval or choose_coco_eval()
        if distributed:
            in_main_process(self._read_ground_truth, dataset_name, max_dets_per_image)
        else:
            self._read_ground_truth(dataset_name, max_dets_per_image)

    def _read_ground_truth(self, dataset_name: str, max_dets_per_image: int) -> None:
        """Initialize the parent, which reads it."""
        has_json = self._metadata.get("json_file") is not None
        if not has_json and self._output_dir:
            # The parent would take a dataset that it has converted before, of other data perhaps.
            path = os.path.join(self._output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, path, allow_cached=False)
            self._metadata.json_file = path
        arguments = (dataset_name, self._tasks, self._distributed, self._output_dir)
        super().__init__(*arguments, max_dets_per_image=max_dets_per_image)
        try:
            self._read_dataset(self._coco_api.dataset)
        finally:
            if not has_json:
                del self._metadata.json_file

    def _read_dataset(self, dataset: Dict[str, Any]) -> None:
        """Prepare the ground truth, the content of a COCO JSON, for evaluations."""
        ids = sorted(image["id"] for image in dataset["images"])
        self._images = {id: number for number, id in enumerate(ids, 1)}
        # Classes are in the order of their ids, also in LVIS, which lacks Detectron2's map, unless
        # the dataset was registered with another.
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        others = {category["id"] for category in dataset["categories"]} - classes.keys()
        self._class_ids = [*sorted(classes, key=classes.get), *sorted(others)]
        self._categories = {id: number for number, id in enumerate(self._class_ids, 1)}
        self._image_entries = [{**x, "id": self._images[x["id"]]} for x in dataset["images"]]
        self._image_entries.sort(key=itemgetter("id"))
        self._category_entries = [{"id": number} for number in self._categories.values()]
        self._objects: List[List[Dict[str, Any]]] = [[] for _ in self._class_ids]
        for annotation in dataset.get("annotations", []):
            annotation.setdefault("iscrowd", 0)  # LVIS has none
            self._objects[self._categories[annotation["category_id"]] - 1].append(annotation)

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        """See the parent; detections are kept as arrays."""
        start = len(self._predictions)
        super().process(inputs, outputs)
        for prediction in self._predictions[start:]:
            if "instances" in prediction:
                results = prediction["instances"]
                prediction["instances"] = Detections(prediction["image_id"], results)

    def evaluate(self, img_ids: Optional[List] = None) -> Dict[str, Any]:
        """
        Evaluate the predictions of all processes, in the main process; others get {}.

        Args:
            img_ids: the images to evaluate. Default: all of the dataset.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = gather_predictions(predictions)
        if not predictions:
            if comm.is_main_process():
                logger.warning("The evaluator did not receive any predictions.")
            return {}
        self._results: Dict[str, Any] = {}
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            write_predictions(
                os.path.join(self._output_dir, "instances_predictions.pth"), predictions
            )
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            self._eval_predictions(predictions, img_ids)
        return copy.deepcopy(self._results)

    def _eval_predictions(
        self, predictions: List[Dict[str, Any]], img_ids: Optional[List] = None
    ) -> None:
        """The parent does not take other implementations; it is used for keypoints."""
        found = [x["instances"] for x in predictions]
        tasks = sorted(self._tasks or {task for x in found for task in x.tasks})
        if "keypoints" in tasks:
            super()._eval_predictions(predictions, img_ids)
            return
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_results_json(path, found, self._class_ids)
        if not self._do_evaluation:
            logger.info("There are no annotations to evaluate the detections with.")
            return
        names = self._metadata.get("thing_classes")
        for task in tasks:
            evaluated = self._evaluate(found, task, img_ids) if any(found) else None
            self._results[task] = self._derive_coco_results(evaluated, task, class_names=names)

    def _counted(self, detections: Detections) -> np.ndarray:
        """The positions, in ascending order, of the detections in an image that are evaluated."""
        return np.arange(len(detections))

    def _evaluate(self, found: List[Detections], task: str, img_ids: Optional[List]):
        """
        Evaluate detections in COCO's format; returns the evaluator.

        Evaluators take dictionaries, and about 2 KB for each detection and for each class in each
        image. Classes do not depend on each other; therefore they are evaluated in groups.
        """
        chosen = None if img_ids is None else set(img_ids)
        found = [x for x in found if chosen is None or x.image_id in chosen]
        counted = [self._counted(x) for x in found]
        none = np.zeros(0, dtype=np.int32)
        classes = np.concatenate([none, *(x.classes[i] for x, i in zip(found, counted))])
        positions = np.concatenate([none, *counted])
        images = np.repeat(np.arange(len(found)), [len(x) for x in counted])
        order = np.argsort(classes, kind="stable")
        counts = np.bincount(classes, minlength=len(self._class_ids))
        groups = np.cumsum(counts + len(self._images)) // _GROUP
        ends = [0, *np.cumsum(counts)]
        axes = {"precision": 2, "recall": 1}  # where the classes are
        parts = []
        for group in np.unique(groups):
            in_group = np.flatnonzero(groups == group)
            rows = order[ends[in_group[0]] : ends[in_group[-1] + 1]]
            results = (found[images[i]][positions[i]] for i in rows)
            coco_eval = self._evaluate_classes(in_group, results, task, chosen)
            parts.append([coco_eval.eval[name] for name in axes])
        coco_eval.eval = {
            name: np.concatenate(values, axes[name]) for name, values in zip(axes, zip(*parts))
        }
        if self._max_dets_per_image[-1] == COCO_MAX_DETS:
            coco_eval.summarize()
        else:
            COCOevalMaxDets.summarize(coco_eval)  # COCO's summary requires a limit of 100
        return coco_eval

    def _evaluate_classes(
        self, classes: np.ndarray, results: Iterable[Dict], task: str, chosen: Optional[set]
    ):
        """The evaluator for the detections of some classes, in the chosen images or all."""
        objects = (x for i in classes for x in self._objects[i])
        annotations = [
            {
                **x,
                "id": number,
                "image_id": self._images[x["image_id"]],
                "category_id": self._categories[x["category_id"]],
            }
            for number, x in enumerate(objects, 1)
            if chosen is None or x["image_id"] in chosen
        ]
        # Without the boxes, pycocotools takes the area of an object from its mask.
        shape = "segmentation" if task == "segm" else "bbox"
        results = [
            {
                "image_id": self._images[x["image_id"]],
                "category_id": x["category_id"] + 1,
                "score": x["score"],
                shape: x[shape],
            }
            for x in results
        ]
        images = {x["image_id"] for x in chain(annotations, results)}
        truth, detections = COCO(), COCO()
        truth.dataset = {
            "images": [self._image_entries[i - 1] for i in sorted(images)],
            "categories": [self._category_entries[i] for i in classes],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            if results:
                detections = truth.loadRes(results)  # which fails if there are none
            else:
                detections.dataset = {**truth.dataset, "annotations": []}
                detections.createIndex()
            coco_eval = self._coco_eval(truth, detections, task)
            coco_eval.params.maxDets = self._max_dets_per_image
            coco_eval.evaluate()
            coco_eval.accumulate()
        return coco_eval
