# SPDX-License-Identifier: Apache-2.0
"""A page about the errors of one or several models: one HTML file that needs no network."""

import base64
import html
import io
import json
import os
from pathlib import Path
from string import Template
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as masks

from ..data.image_reading import read_image
from ..errors import ArgumentError, InputError
from ..utils.web_page import write_web_page
from .detection_errors import ERROR_TYPES
from .detection_metrics import DetectionMetrics
from .matching import IOU_THRESHOLDS

__all__ = ["MAX_MODELS", "write_error_page"]

_PARTS = Path(__file__).with_name("page")
_CODE = ("tables.js", "charts.js", "images.js")
#: each has a letter that is a key on the page
MAX_MODELS = 23
_THUMBNAIL = 480  # pixels of the longest side
_MAX_BOXES = 100  # of a model in an image, those with the highest scores


def _script() -> str:
    """plotly.js, safe in a script element."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise InputError(
            'the page needs Plotly, which is not installed: pip install "libra_d2[report]"'
        ) from e
    return get_plotlyjs().replace("</script", "<\\/script")


def _json(value: Any) -> str:
    """JSON that is safe in a script element, whatever text is in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _thumbnail(path: str) -> str:
    """A JPEG file in base64."""
    image = Image.fromarray(np.ascontiguousarray(read_image(path, "RGB")))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=75)
    return base64.b64encode(content.getvalue()).decode("ascii")


def _box(entry: Dict[str, Any]) -> List[float]:
    """[x, y, width, height], in pixels, of a detection; masks may come without."""
    box = entry["bbox"] if "bbox" in entry else masks.toBbox(entry["segmentation"]).tolist()
    return [round(float(x), 1) for x in box]


class _Boxes:
    """Objects and detections of an image, as the page draws them."""

    def __init__(self, dataset: Dict, models: Sequence[DetectionMetrics], results: Sequence[List]):
        self.models, self.results = models, results
        self.annotations = {x["id"]: x for x in dataset["annotations"]}
        self.finders = [x.matches.finders() for x in models]

    def objects(self, image: int) -> List[List]:
        """
        [x, y, width, height, class, [IoU, score] of each model or None if it does not find it] of
        each object; crowd regions, which need not be found, have no last item.
        """
        m, rows = self.models[0].matches, []
        for g in range(*np.searchsorted(m.object_image, [image, image + 1])):
            row = [*_box(self.annotations[m.object_ids[g]]), int(m.object_class[g])]
            if m.object_counts[0, g]:
                own = [(x.matches, finders[g]) for x, finders in zip(self.models, self.finders)]
                row.append(
                    [
                        [round(float(x), 3) for x in (n.found_iou[d], n.score[d])]
                        if d >= 0
                        else None
                        for n, d in own
                    ]
                )
            rows.append(row)
        return rows

    def detections(self, model: int, image: int) -> List[List]:
        """
        [x, y, width, height, class, score, what it is, the object that it finds or -1] of each; the
        object is its position in :meth:`objects`.
        """
        m, kinds = self.models[model].matches, self.models[model].errors.kind
        first_object = np.searchsorted(m.object_image, image)
        start, end = np.searchsorted(m.image, [image, image + 1])
        rows = []
        for d in range(start, min(end, start + _MAX_BOXES)):
            entry, g = self.results[model][m.position[d]], m.found[0, d]
            what = ERROR_TYPES[kinds[d]] if kinds[d] >= 0 else "right" if g >= 0 else "not counted"
            own = [int(m.detected_class[d]), round(float(m.score[d]), 3), what]
            rows.append([*_box(entry), *own, int(g - first_object) if g >= 0 else -1])
        return rows

    def classes(self, image: int) -> List[int]:
        """The classes of all that is drawn."""
        m = self.models[0].matches
        seen = [m.object_class[m.object_image == image]]
        seen += [x.matches.detected_class[x.matches.image == image] for x in self.models]
        return np.unique(np.concatenate(seen)).tolist()


def _ordered_images(numbers: Dict[str, Any]) -> List[Dict]:
    """
    Rows of all images, worst first: where a model differs most from the first, or where the only
    one has least AP. They have the "ap" of each model, and "only", how many objects the first one
    alone and each of the others alone finds.
    """
    own = [{x["image_id"]: x for x in model["images"]} for model in numbers["models"]]
    pairs = [{x["image_id"]: x for x in other["images"]} for other in numbers["comparisons"]]
    rows = []
    for id, first in own[0].items():
        row = {"image_id": id, "ap": [x[id]["AP"] for x in own]}
        row["errors"] = sum(first[k] for k in ERROR_TYPES)
        row["only"] = [[x[id]["only_a"], x[id]["only_b"]] for x in pairs]
        rows.append(row)
    if not pairs:
        return sorted(rows, key=lambda x: (x["ap"] == [None], x["ap"], -x["errors"]))
    gaps = [max(abs(y - x["ap"][0]) for y in x["ap"]) if None not in x["ap"] else 0 for x in rows]
    return [rows[i] for i in np.argsort(np.negative(gaps), kind="stable")]


def write_error_page(
    path: str,
    numbers: Dict[str, Any],
    dataset: Dict,
    models: Sequence[DetectionMetrics],
    results: Sequence[List[Dict]],
    *,
    names: Sequence[str],
    title: str = "Errors",
    image_root: Optional[str] = None,
    max_images: int = 200,
    curves: Sequence[Optional[Dict]] = (),
    notes: Sequence[str] = (),
) -> None:
    """
    Write an HTML file with the metrics of one or several models, their differences to the first
    one, and their boxes over the images. Numbers are in percent.

    Args:
        path: of the file.
        numbers: "models", what :func:`describe_runs` returns of each, and "comparisons", for each
            model but the first the number of "pairs" of runs, "metrics" of :func:`compare_runs` and
            "images" of :func:`compare_images`.
        dataset: annotations in COCO's format.
        models: a run of each model, whose boxes are drawn.
        results: their detections in COCO's format.
        names: of the models, any text.
        title: of the page, any text.
        image_root: folder of the images. Default: boxes are drawn on an empty ground.
        max_images: how many images are in the file, those where a model differs most from the first
            or where the only one has the lowest AP. With pictures, each needs about 30 kB.
        curves: of each model "iterations", and the "mean", "low" and "high" AP of its runs there.
        notes: paragraphs above the tables, any text.

    Raises:
        InputError: if Plotly is not installed, or an image cannot be read.
        ArgumentError: if there are too many models, or ``max_images`` is negative.
    """
    if not 1 <= len(models) <= MAX_MODELS:
        raise ArgumentError("models", models, f"use 1 to {MAX_MODELS}")
    if max_images < 0:
        raise ArgumentError("max_images", max_images, "use 0 or more")
    plotly, m, boxes = _script(), models[0].matches, _Boxes(dataset, models, results)
    by_id = {x["id"]: x for x in dataset["images"]}
    place = {x: i for i, x in enumerate(m.image_ids)}
    rows, images, pictures = _ordered_images(numbers), [], []
    for row in rows[:max_images]:
        entry, i = by_id[row["image_id"]], place[row["image_id"]]
        size = [entry["width"], entry["height"]]
        image = {**row, "file_name": entry["file_name"], "size": size, "classes": boxes.classes(i)}
        picture: Dict[str, Any] = {
            "objects": boxes.objects(i),
            "detections": [boxes.detections(k, i) for k in range(len(models))],
        }
        if image_root is not None:
            picture["jpeg"] = _thumbnail(os.path.join(image_root, entry["file_name"]))
        images.append(image)
        pictures.append(picture)
    data = {
        "names": list(names),
        "models": [{k: v for k, v in x.items() if k != "images"} for x in numbers["models"]],
        "thresholds": IOU_THRESHOLDS.round(2).tolist(),
        "class_names": m.class_names,
        "comparisons": [
            {
                "pairs": x["pairs"],
                "metrics": x["metrics"],
                "only": [sum(image[k] for image in x["images"]) for k in ("only_a", "only_b")],
            }
            for x in numbers["comparisons"]
        ],
        "curves": list(curves),
        "images": images,
        "num_images": len(rows),
    }
    tags = '<script type="application/json" id="picture-{}">{}</script>\n'
    style, page, *code = (
        (_PARTS / x).read_text("utf-8") for x in ("style.css", "body.html", *_CODE)
    )
    parts = {
        "notes": "".join(f"<p><b>{html.escape(x)}</b></p>" for x in notes),
        "data": _json(data),
        "code": "\n".join(code),
        "pictures": "".join(tags.format(i, _json(x)) for i, x in enumerate(pictures)),
        "plotly": plotly,
    }
    write_web_page(path, title, Template(page).substitute(parts), style)
