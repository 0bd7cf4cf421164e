#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Convert annotations in YOLO's format, with one text file for each image, to a COCO JSON.

    python tools/yolo_to_coco.py --labels labels/train --images images/train \
        --data data.yaml --output train.json

Class names come from "names" in the dataset's YAML file (--data), or from --classes in the order of
their numbers. Each line of a text file holds a class and a box, or a class and a polygon. Images
without a text file have no objects.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from libra_d2.data.image_reading import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    displayed_size,
    why_unreadable,
)
from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError, counted, one_line
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.output_path import output_path

_SLACK = 0.01  # of the image: corners are rounded


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = argument_parser(__doc__)
    parser.add_argument("--labels", required=True, metavar="DIR")
    parser.add_argument("--images", required=True, metavar="DIR")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument(
        "--data", metavar="FILE", help="the dataset's YAML file, with 'names' as a list or a map"
    )
    names.add_argument("--classes", nargs="+", metavar="NAME")
    parser.add_argument("--output", required=True, metavar="FILE")
    return parser


def read_names(path: str) -> List[str]:
    """
    The class names in a data.yaml, in the order of their numbers.

    Raises:
        InputError: if the file cannot be read, there are no names, or a number is left out.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            content = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"--data: {path}: not a readable YAML file ({one_line(e)})") from e
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or {*names} != {*range(len(names))}:
        raise InputError(
            f"--data: {path}: 'names' must be a list, or a map from 0, 1, ... to the class names"
        )
    return [str(names[i]) for i in range(len(names))]


def read_object(line: str, num_classes: int, size: Tuple[int, int]) -> Dict[str, Any]:
    """
    "category_id", "bbox" (absolute XYWH), "area" and "segmentation" (polygons) of a line of a text
    file for an image of ``size``, (width, height) in pixels. Raises: ValueError: if it is broken.
    """
    number, *values = line.split()
    if number not in map(str, range(num_classes)):
        raise ValueError(f"the class is {number}, but there are names for {num_classes} classes")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"{len(values)} numbers after the class are neither a box nor a polygon")
    points = np.array(values, dtype=float).reshape(-1, 2)
    if not (np.abs(points - 0.5) <= 0.5 + _SLACK).all():
        raise ValueError("coordinates must be shares of the width and height, from 0 to 1")
    points, polygon = points * size, []
    if len(points) == 2:
        center, extent = points
        points = np.stack([center - extent / 2, center + extent / 2])
    else:
        points = points.clip(0, size)
        polygon = [points.ravel().tolist()]
    (x, y), low, high = points.T, points.min(0), points.max(0)
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 if polygon else np.prod(high - low)
    return {
        "category_id": int(number) + 1,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(area),
        "segmentation": polygon,
        "iscrowd": 0,
    }


def read_image_labels(image: Path, labels: Path, num_classes: int) -> Tuple[Dict, List[Dict]]:
    """
    "width" and "height" of an image, and the objects in its text file, if there is one.

    Raises:
        InputError: if one of the two is broken. It names the line.
    """
    try:
        with Image.open(image) as file:
            size = displayed_size(file)
    except UNREADABLE as e:
        raise InputError(f"{image}: not a readable image ({why_unreadable(e)})") from e
    objects, place = [], ""
    try:
        text = labels.read_text(encoding="utf-8-sig") if labels.is_file() else ""
        for i, line in enumerate(text.splitlines(), 1):
            place = f"line {i}: "
            if line.strip():
                objects.append(read_object(line, num_classes, size))
    except (OSError, ValueError) as e:
        raise InputError(f"{labels}: {place}{one_line(e)}") from e
    return {"width": size[0], "height": size[1]}, objects


def convert(labels: Path, images: Path, names: Sequence[str]) -> Dict[str, List]:
    """
    The content of a COCO JSON for all images in a folder and in the folders in it; the text files
    are in the same folders of ``labels``.

    Raises:
        InputError: if a file is broken, there are no images or labels, or a text file belongs to no
            image.
    """
    for option, folder in (("--images", images), ("--labels", labels)):
        if not folder.is_dir():
            raise InputError(f"{option}: {folder}: no such folder")
    files = sorted(x for x in images.rglob("*") if x.suffix.lower() in IMAGE_SUFFIXES)
    label_of = {x: (labels / x.relative_to(images)).with_suffix(".txt") for x in files}
    found = {x for x in labels.rglob("*.txt") if x.name != "classes.txt"}
    if not files:
        raise InputError(f"--images: {images}: there are no images in it")
    if not found:
        raise InputError(f"--labels: {labels}: there are no text files in it")
    for path in sorted(found.difference(label_of.values())):
        raise InputError(f"{path}: there is no image for it in {images}")
    image_of: Dict[Path, Path] = {}
    for path, label in label_of.items():
        if label in found and image_of.setdefault(label, path) != path:
            raise InputError(f"{path} and {image_of[label]} have the same text file: remove one")
    dataset = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    for image_id, (path, label) in enumerate(tqdm(label_of.items(), unit="image"), 1):
        size, objects = read_image_labels(path, label, len(names))
        name = path.relative_to(images).as_posix()
        dataset["images"].append({"id": image_id, "file_name": name, **size})
        for x in objects:
            ids = {"id": len(dataset["annotations"]) + 1, "image_id": image_id}
            dataset["annotations"].append({**ids, **x})
    return dataset


def run(args: argparse.Namespace) -> None:
    """Read, convert, and write a dataset."""
    names = args.classes or read_names(args.data)
    for twice in (x for x in names if names.count(x) > 1):
        option = "--classes" if args.classes else f"--data: {args.data}"
        raise InputError(f"{option}: the class {twice!r} is there twice")
    others = {"--data": args.data}
    for option, folder in (("--labels", args.labels), ("--images", args.images)):
        others[option] = [str(x) for x in Path(folder).rglob("*") if x.suffix != ".json"]
    output = output_path("--output", args.output, others)
    dataset = convert(Path(args.labels), Path(args.images), names)
    with atomic_write(output, "w") as f:
        json.dump(dataset, f, allow_nan=False)
    num_empty = len(dataset["images"]) - len({x["image_id"] for x in dataset["annotations"]})
    print(
        f"{args.output}: {counted(len(dataset['images']), 'image')}, "
        f"{counted(len(dataset['annotations']), 'object')}; "
        f"nothing is annotated in {num_empty} of the images"
    )


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
