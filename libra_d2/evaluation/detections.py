# SPDX-License-Identifier: Apache-2.0
"""The detections of many images in little memory, and their files."""

import json
import pickle
import zipfile
from collections.abc import Sequence
from typing import IO, Any, Dict, List

import numpy as np
import torch

from detectron2.utils import comm

from ..utils.atomic_write import atomic_write

__all__ = ["Detections", "gather_predictions", "write_predictions", "write_results_json"]

_IMAGES_AT_ONCE = 500  # that are gathered; several copies of them are made


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """The same numbers as float32, which models return, unless some would be rounded."""
    narrow = numbers.astype(np.float32)
    return narrow if np.array_equal(narrow, numbers) else numbers


class Detections(Sequence):
    """
    The detections in one image. It behaves as the list of dictionaries in COCO's result format that
    it is made of, but takes 24 bytes for each, and those of its run-length mask or keypoints.
    """

    def __init__(self, image_id: Any, results: List[Dict[str, Any]]):
        """
        Args:
            image_id: the image, as in the dataset.
            results: what Detectron2's ``instances_to_coco_json`` returns.
        """
        self.image_id = image_id
        #: (N,) contiguous class ids
        self.classes = np.array([x["category_id"] for x in results], dtype=np.int32)
        numbers = np.array([[*x["bbox"], x["score"]] for x in results]).reshape(-1, 5)
        self._numbers = _narrow(numbers)  # x, y, width, height, score
        self._keypoints = self._mask_size = None
        if results and "keypoints" in results[0]:
            self._keypoints = _narrow(np.array([x["keypoints"] for x in results]))
        if results and "segmentation" in results[0]:
            counts = [x["segmentation"]["counts"].encode() for x in results]
            self._mask_size = results[0]["segmentation"]["size"]
            self._counts = b"".join(counts)
            self._ends = np.cumsum([0, *map(len, counts)], dtype=np.int64)

    @property
    def scores(self) -> np.ndarray:
        """(N,)"""
        return self._numbers[:, 4]

    @property
    def tasks(self) -> List[str]:
        """What can be evaluated in them, for example bbox and segm."""
        found = {"segm": self._mask_size, "keypoints": self._keypoints}
        return ["bbox", *(task for task, x in found.items() if x is not None)]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, i: int) -> Dict[str, Any]:
        *box, score = self._numbers[i].tolist()
        result = {"image_id": self.image_id, "category_id": int(self.classes[i])}
        result.update(bbox=box, score=score)
        if self._mask_size is not None:
            counts = self._counts[self._ends[:-1][i] : self._ends[1:][i]].decode()
            result["segmentation"] = {"size": list(self._mask_size), "counts": counts}
        if self._keypoints is not None:
            result["keypoints"] = self._keypoints[i].tolist()
        return result


def gather_predictions(predictions: List[Any]) -> List[Any]:
    """Those of all processes, by rank, in the main process; [] in the others."""
    largest = max(comm.all_gather(len(predictions)))
    gathered: List[List[Any]] = [[] for _ in range(comm.get_world_size())]
    for start in range(0, largest, _IMAGES_AT_ONCE):
        part = comm.gather(predictions[start : start + _IMAGES_AT_ONCE])
        for mine, more in zip(gathered, part):
            mine += more
    return [x for mine in gathered for x in mine]


def write_results_json(path: str, images: List[Detections], class_ids: Sequence) -> None:
    """
    Write detections in COCO's result format.

    Args:
        path: the file, which appears when it is complete.
        images: the detections in each image.
        class_ids: (K,) the dataset's ids of the classes, in the order of the contiguous ids.
    """
    with atomic_write(path, "w") as f:
        comma = "["
        for image in images:
            results = [{**x, "category_id": class_ids[x["category_id"]]} for x in image]
            if results:
                f.write(comma + json.dumps(results)[1:-1])
                comma = ", "
        f.write("]" if comma != "[" else "[]")


def write_predictions(path: str, predictions: List[Dict[str, Any]]) -> None:
    """
    Write a file for ``torch.load`` as :class:`COCOEvaluator` does, but an image at a time:
    ``torch.save`` would need the dictionaries of all detections in memory.

    Args:
        path: the file, which appears when it is complete.
        predictions: dictionaries with "image_id", and "instances" as :class:`Detections` or
            "proposals" as Detectron2's ``Instances``.
    """
    with atomic_write(path) as f:
        if "proposals" in predictions[0]:
            torch.save(predictions, f)
        else:
            _save_detections(f, predictions)


def _save_detections(file: IO, predictions: List[Dict[str, Any]]) -> None:
    """What ``torch.save`` writes, of a list whose items are pickled one by one."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as data:
            data.write(pickle.PROTO + b"\x02" + pickle.EMPTY_LIST)
            for prediction in predictions:
                item = {**prediction, "instances": list(prediction["instances"])}
                # Without the mark of the protocol at the start, and that of the end.
                data.write(pickle.dumps(item, protocol=2)[2:-1] + pickle.APPEND)
            data.write(pickle.STOP)
