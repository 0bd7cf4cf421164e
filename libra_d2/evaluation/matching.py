# SPDX-License-Identifier: Apache-2.0
"""Which detection finds which object, as COCO's evaluation decides it, in arrays."""

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO

from ..data.coco_schema import is_number, shorten
from ..data.run_lengths import check_run_lengths
from ..errors import InputError, check_choice, one_line

__all__ = ["IOU_THRESHOLDS", "IOU_TYPES", "RANGES", "Matches", "match_detections", "read_results"]

#: the shape whose IoU counts, by name; each is a key of a detection
IOU_TYPES = {"bbox": "bbox", "segm": "segmentation"}
#: IoU from which on a detection finds an object: COCO's ten
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
#: The objects that AP may be limited to. Both ends of a range belong to it. Areas are in square
#: pixels; crowdedness is the largest IoU with another object of the class in the image.
RANGES = {
    "all": ("area", 0, 1e10),
    "small": ("area", 0, 32**2),
    "medium": ("area", 32**2, 96**2),
    "large": ("area", 96**2, 1e10),
    "apart": ("crowdedness", 0, 0.1),
    "close": ("crowdedness", 0.1, 0.3),
    "crowded": ("crowdedness", 0.3, 1),
}


@dataclass
class Matches:
    """
    G objects, crowd regions included, sorted by image; D detections, sorted by image and descending
    score; and which of them belong together, for T = 10 :data:`IOU_THRESHOLDS` and R = 7
    :data:`RANGES`. Images, classes and objects are named by their position.
    """

    image_ids: List[Any]  # ascending
    class_ids: List[Any]  # ascending
    class_names: List[str]
    object_ids: List[Any]  # of the annotations
    object_image: np.ndarray  # (G,)
    object_class: np.ndarray  # (G,)
    object_counts: np.ndarray  # (R, G) of bool: what must be found; no crowd region ever counts
    position: np.ndarray  # (D,) in the list of results
    image: np.ndarray  # (D,)
    detected_class: np.ndarray  # (D,)
    score: np.ndarray  # (D,)
    status: np.ndarray  # (R, T, D): 1 is a true positive, 0 a false one, -1 does not count
    found: np.ndarray  # (T, D): the object that a detection finds, or -1; range "all"
    found_iou: np.ndarray  # (D,): the IoU with the object found at 0.5, or 0
    nearest: np.ndarray  # (2, D): of the objects of its class, of other classes, or -1
    nearest_iou: np.ndarray  # (2, D): the IoU with them, or 0

    def finders(self) -> np.ndarray:
        """(G,): the detection that finds each object at an IoU of 0.5, or -1."""
        finders = np.full(len(self.object_ids), -1)
        detections = np.flatnonzero(self.found[0] >= 0)
        finders[self.found[0, detections]] = detections
        return finders


def read_results(path: str) -> List[Any]:
    """
    Read the detections of an evaluation, such as ``coco_instances_results.json``.

    Raises:
        InputError: if the file cannot be read, or is no JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: no readable JSON file of detections: {one_line(e)}") from e


def _problem(result: Any, images: Dict, classes: Dict, key: str) -> str:
    """What is wrong with a detection, or ""."""
    if not isinstance(result, dict):
        return f"{shorten(result)} is no detection with image_id, category_id, score and {key}"
    for name, known in (("image_id", images), ("category_id", classes)):
        value = result.get(name)
        if not isinstance(value, (int, float, str)) or value not in known:
            return f"the {name} {shorten(value)} is not in the annotations"
    score, shape = result.get("score"), result.get(key)
    if not is_number(score):
        return f"the score {shorten(score)} is no finite number"
    if shape is None:
        return f"there is no {key!r}; choose the IoU type that was evaluated"
    if key == "bbox":
        is_box = isinstance(shape, list) and len(shape) == 4 and all(map(is_number, shape))
        if not is_box or min(shape[2:]) < 0:
            return f"the bbox {shorten(shape)} is not [x, y, width, height] in finite pixels"
        return ""
    try:
        if not isinstance(shape, dict):
            raise ValueError("it must have a run-length mask")
        image = images[result["image_id"]]
        check_run_lengths(shape, image["height"], image["width"])
    except ValueError as e:
        return str(e)
    return ""


def _shapes(entries: Sequence[Dict], images: Dict, iou_type: str) -> np.ndarray:
    """(N, 4) boxes, or (N,) run-length masks."""
    if iou_type == "bbox":
        return np.array([x["bbox"] for x in entries], dtype=float).reshape(-1, 4)
    coco, shapes = COCO(), np.empty(len(entries), dtype=object)
    coco.imgs = images
    for i, entry in enumerate(entries):
        shapes[i] = coco.annToRLE(entry)
    return shapes


def _iou(first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(N, M) IoU of shapes; with a crowd region, the share of the first one that is in it."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    is_box = first.ndim == 2
    shapes = (first, second) if is_box else (first.tolist(), second.tolist())
    return np.asarray(masks.iou(*shapes, crowd.astype(np.uint8)))


def _assign(ious: np.ndarray, counts: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """
    COCO's assignment in one image: in the order of their scores, detections get the object with the
    highest IoU that is still free, objects that count first; crowd regions are always free.

    Args:
        ious: (D, G), -1 between different classes.
        counts: (R, G), which objects count.
        crowd: (G,), which are crowd regions.

    Returns:
        (R, T, D), the object of each detection, or -1.
    """
    floor = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    assigned = np.full((len(counts), len(floor), len(ious)), -1)
    free = np.ones((len(counts), len(floor), len(crowd)), dtype=bool)
    for d, candidates in enumerate(ious >= floor[0]):
        # Of equal objects the last one is taken.
        g = np.flatnonzero(candidates)[::-1]
        if not len(g):
            continue
        fits = (ious[d, g] >= floor) & free[..., g]
        preferred = fits & counts[:, None, g]
        fits = np.where(preferred.any(-1, keepdims=True), preferred, fits)
        best = g[np.where(fits, ious[d, g], -1).argmax(-1)]
        r, t = np.nonzero(fits.any(-1))
        assigned[r, t, d] = best[r, t]
        free[r, t, best[r, t]] = crowd[best[r, t]]
    return assigned


def _in_ranges(values: Dict[str, np.ndarray]) -> np.ndarray:
    """(R, N) of bool, for N values of each kind."""
    return np.stack([(low <= values[k]) & (values[k] <= high) for k, low, high in RANGES.values()])


def _crowdedness(ious: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(G,) largest IoU of each object with another one of its class, from all of them, (G, G)."""
    is_other = (labels[:, None] == labels) & ~crowd & ~crowd[:, None]
    np.fill_diagonal(is_other, False)
    return np.where(is_other, ious, 0).max(1, initial=0)


def _match_image(m: Matches, g: slice, d: slice, objects: Dict, detections: Dict) -> None:
    """Fill in the objects ``g`` and the detections ``d`` of an image: their shapes, areas, ..."""
    crowd, labels, shapes = objects["crowd"][g], m.object_class[g], objects["shapes"][g]
    crowdedness = _crowdedness(_iou(shapes, shapes, np.zeros_like(crowd)), labels, crowd)
    counts = _in_ranges({"area": objects["area"][g], "crowdedness": crowdedness}) & ~crowd
    m.object_counts[:, g] = counts

    ious = _iou(detections["shapes"][d], shapes, crowd)
    same = m.detected_class[d, None] == labels
    # A last column stands for no object, which position -1 is.
    crowdedness = np.append(crowdedness, 0)
    counts_or_none = np.append(counts, np.zeros((len(counts), 1), dtype=bool), axis=1)
    own_place = np.append(np.arange(len(labels)) + g.start, -1)
    for k, wanted in enumerate((same, ~same)):
        candidates = np.where(wanted & counts[0], ious, 0)
        candidates = np.append(np.zeros((len(ious), 1)), candidates, axis=1)  # none comes first
        nearest = candidates.argmax(1) - 1
        m.nearest[k, d], m.nearest_iou[k, d] = own_place[nearest], candidates.max(1)
        if k == 0:
            in_range = {"area": detections["area"][d], "crowdedness": crowdedness[nearest]}

    assigned = _assign(np.where(same, ious, -1), counts, crowd)
    is_true = np.take_along_axis(counts_or_none[:, None], assigned, axis=2)
    is_false = (assigned < 0) & _in_ranges(in_range)[:, None]
    m.status[:, :, d] = np.where(is_true, 1, np.where(is_false, 0, -1))
    m.found[:, d] = own_place[np.where(is_true[0], assigned[0], -1)]
    right = np.flatnonzero(is_true[0, 0])
    m.found_iou[right + d.start] = ious[right, assigned[0, 0, right]]


def match_detections(
    dataset: Dict,
    results: Sequence[Dict],
    iou_type: str = "bbox",
    *,
    max_detections: int = 100,
    name: str = "results",
) -> Matches:
    """
    Match detections to objects as pycocotools does. All annotations but crowd regions count;
    pycocotools does not look at "ignore" either.

    For sizes, the area of a detection that finds nothing decides where it counts. For crowdedness,
    it counts where the object of its class does that it overlaps most; if there is none, with the
    objects that are apart.

    Args:
        dataset: annotations in COCO's format, see :func:`libra_d2.data.coco_json.read_coco_json`.
        results: detections in COCO's format. There may be none.
        iou_type: "bbox" or "segm".
        max_detections: how many of an image and a class count, those with the highest scores.
        name: of the results, for messages.

    Raises:
        InputError: if the results are no list, or a detection is broken or belongs to no image or
            class of the dataset. The message names the first one, counted from 0.
        ArgumentError: if the IoU type is another one.
    """
    check_choice("iou_type", iou_type, tuple(IOU_TYPES))
    if not isinstance(results, (list, tuple)):
        raise InputError(f"{name}: not in COCO's result format, which is a list of detections")
    images = {x["id"]: x for x in dataset["images"]}
    names = {x["id"]: x["name"] for x in dataset["categories"]}
    for i, result in enumerate(results):
        problem = _problem(result, images, names, IOU_TYPES[iou_type])
        if problem:
            raise InputError(f"{name}: detection number {i}: {problem}")
    image_ids, class_ids = sorted(images), sorted(names)
    image_of, class_of = ({x: i for i, x in enumerate(ids)} for ids in (image_ids, class_ids))

    def arrays(entries: Sequence[Dict]) -> Tuple[np.ndarray, np.ndarray]:
        places = [(image_of[x["image_id"]], class_of[x["category_id"]]) for x in entries]
        return tuple(np.array(places, dtype=int).reshape(-1, 2).T)

    annotations = sorted(dataset["annotations"], key=lambda x: image_of[x["image_id"]])
    objects = {
        "shapes": _shapes(annotations, images, iou_type),
        "area": np.array([x["area"] for x in annotations], dtype=float),
        "crowd": np.array([bool(x.get("iscrowd", 0)) for x in annotations], dtype=bool),
    }
    image, label = arrays(results)
    score = np.array([x["score"] for x in results], dtype=float)
    order = np.lexsort((-score, label, image))
    group = image[order] * len(class_ids) + label[order]
    order = np.sort(order[np.arange(len(order)) - np.searchsorted(group, group) < max_detections])
    order = order[np.lexsort((-score[order], image[order]))]
    shapes = _shapes([results[i] for i in order], images, iou_type)
    area = shapes[:, 2] * shapes[:, 3] if iou_type == "bbox" else masks.area(shapes.tolist())
    detections = {"shapes": shapes, "area": np.asarray(area, dtype=float)}

    num_t, num_d, num_g = len(IOU_THRESHOLDS), len(order), len(annotations)
    m = Matches(
        *(image_ids, class_ids, [names[x] for x in class_ids], [x["id"] for x in annotations]),
        *arrays(annotations),
        object_counts=np.zeros((len(RANGES), num_g), dtype=bool),
        position=order,
        image=image[order],
        detected_class=label[order],
        score=score[order],
        status=np.zeros((len(RANGES), num_t, num_d), dtype=np.int8),
        found=np.full((num_t, num_d), -1),
        found_iou=np.zeros(num_d),
        nearest=np.full((2, num_d), -1),
        nearest_iou=np.zeros((2, num_d)),
    )
    places = np.arange(len(image_ids) + 1)
    ends = [np.searchsorted(x, places) for x in (m.object_image, m.image)]
    for i in places[:-1]:
        _match_image(m, *(slice(*x[i : i + 2]) for x in ends), objects, detections)
    return m
