# SPDX-License-Identifier: Apache-2.0
"""A page about the errors of one or two models: one HTML file that needs no network."""

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
from ..utils.atomic_write import atomic_write
from .detection_errors import ERROR_TYPES
from .detection_metrics import DetectionMetrics
from .matching import IOU_THRESHOLDS

__all__ = ["write_error_page"]

_PARTS = Path(__file__).with_suffix("")  # error_page.html, .css and .js
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
    """Rows of all images, worst first: where two models differ most, or where one has least AP."""
    if "comparison" in numbers:
        rows = numbers["comparison"]["images"]
        return sorted(rows, key=lambda x: -abs(x["difference"] or 0))
    rows = [
        {"image_id": x["image_id"], "a": x["AP"], "errors": sum(x[k] for k in ERROR_TYPES)}
        for x in numbers["models"][0]["images"]
    ]
    return sorted(rows, key=lambda x: (x["a"] is None, x["a"], -x["errors"]))


def write_error_page(
    path: str,
    numbers: Dict[str, Any],
    dataset: Dict,
    models: Sequence[DetectionMetrics],
    results: Sequence[List[Dict]],
    *,
    names: Sequence[str] = ("A", "B"),
    title: str = "Errors",
    image_root: Optional[str] = None,
    max_images: int = 200,
) -> None:
    """
    Write an HTML file with the metrics of one or two models, their differences, and their boxes
    over the images. Numbers are in percent.

    Args:
        path: of the file.
        numbers: "models", a list of what :meth:`DetectionMetrics.describe` returns, and for two
            models "comparison", with "metrics" of :func:`compare_metrics` and "images" of
            :func:`compare_images`.
        dataset: annotations in COCO's format.
        models: the one or two models, on this dataset.
        results: their detections in COCO's format.
        names: of the models, any text.
        title: of the page, any text.
        image_root: folder of the images. Default: boxes are drawn on an empty ground.
        max_images: how many images are in the file, those where two models differ most or where
            one has the lowest AP. With pictures, each needs about 30 kB.

    Raises:
        InputError: if Plotly is not installed, or an image cannot be read.
        ArgumentError: if there are not one or two models, or ``max_images`` is negative.
    """
    if not 1 <= len(models) <= 2:
        raise ArgumentError("models", models, "use one or two")
    if max_images < 0:
        raise ArgumentError("max_images", max_images, "use 0 or more")
    plotly, m, boxes = _script(), models[0].matches, _Boxes(dataset, models, results)
    by_id, place = (
        {x["id"]: x for x in dataset["images"]},
        {x: i for i, x in enumerate(m.image_ids)},
    )
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
    comparison = numbers.get("comparison")
    data = {
        "names": list(names[: len(models)]),
        "models": [{k: v for k, v in x.items() if k != "images"} for x in numbers["models"]],
        "thresholds": IOU_THRESHOLDS.round(2).tolist(),
        "class_names": m.class_names,
        "comparison": comparison and comparison["metrics"],
        "only": comparison and [sum(x[k] for x in rows) for k in ("only_a", "only_b")],
        "images": images,
        "num_images": len(rows),
    }
    tags = '<script type="application/json" id="picture-{}">{}</script>\n'
    style, code, page = (_PARTS.with_suffix(x).read_text("utf-8") for x in (".css", ".js", ".html"))
    parts = {
        "title": html.escape(title),
        "style": style,
        "data": _json(data),
        "code": code,
        "pictures": "".join(tags.format(i, _json(x)) for i, x in enumerate(pictures)),
        "plotly": plotly,
    }
    with atomic_write(path, "w") as f:
        f.write(Template(page).substitute(parts))
