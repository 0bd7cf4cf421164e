#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Make a synthetic detection dataset in COCO format, within seconds.

    python tools/make_synthetic_dataset.py datasets/synthetic/train --num-images 300 --seed 1

writes ``images/*.jpg`` and ``instances.json`` into the given directory. Shapes of widely different
sizes overlap each other on textured backgrounds with distractors: strokes, and shapes of no class.
The same arguments give the same bytes.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import pycocotools.mask as mask_utils
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError, counted, one_line
from libra_d2.utils.output_path import output_path

__all__ = ["CLASSES", "make_synthetic_dataset"]

# Outlines in a unit circle around the origin, as (radius, angle in turns) of their corners.
_OUTLINES = {
    "square": [(1, (2 * i + 1) / 8) for i in range(4)],
    "triangle": [(1, i / 3 - 0.25) for i in range(3)],
    "circle": [(1, i / 48) for i in range(48)],
    "star": [(1 if i % 2 == 0 else 0.42, i / 10 - 0.25) for i in range(10)],
    "cross": [
        (r, (i + d) / 4) for i in range(4) for r, d in ((1, -0.06), (1, 0.06), (0.52, 0.125))
    ],
    "arrow": [(1, 0), (0.75, 0.2), (0.3, 0.2), (0.85, 0.43), (0.85, 0.57), (0.3, 0.8), (0.75, 0.8)],
}
_DISTRACTORS = {
    "crescent": [(1, i / 32) for i in range(-8, 9)] + [(0.45, -i / 32) for i in range(-8, 9)],
    "bar": [(1, 0.02), (1, 0.48), (1, 0.52), (1, 0.98)],
}
CLASSES = tuple(_OUTLINES)

_DESCRIPTION = "libra_d2 synthetic shapes"
_OVERSAMPLING = 4  # for anti-aliasing
_MIN_VISIBLE = 0.4  # visible part of each object, at least


def _outline(corners, center, radius: float, turn: float, stretch: float) -> List[tuple]:
    """Squeeze, rotate, scale and place an outline; returns points of the oversampled image."""
    points = [(r * math.cos(math.tau * a), r * math.sin(math.tau * a)) for r, a in corners]
    points = np.array(points) * [1, stretch]
    c, s = math.cos(math.tau * turn), math.sin(math.tau * turn)
    points = radius * points @ np.array([[c, s], [-s, c]]) + center
    return [tuple(p) for p in points * _OVERSAMPLING]


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Smooth blobs around one color, with noise on top."""
    blobs = rng.integers(40, 216, 3) + rng.uniform(-1, 1, (rng.integers(3, 9),) * 2 + (3,)) * 25
    blobs = Image.fromarray(blobs.clip(0, 255).astype(np.uint8))
    image = np.asarray(blobs.resize((size, size), Image.BICUBIC), dtype=np.float32)
    image = image + rng.normal(0, rng.uniform(1, 8), image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _color(rng: np.random.Generator, below: np.ndarray, hue: Optional[float]) -> tuple:
    """
    A random color that differs from the mean color of ``below``, (num_pixels, 3), by 90 or more of
    255 in some channel if possible; close to ``hue``, in turns, if that is given.
    """
    hues = rng.random(32) if hue is None else hue + rng.uniform(-0.05, 0.05, 32)
    hsv = np.stack([hues % 1, rng.uniform(0.4, 1, 32), rng.uniform(0.4, 1, 32)], axis=1)
    colors = np.asarray(Image.fromarray((hsv[None] * 255).astype(np.uint8), "HSV").convert("RGB"))
    contrast = np.abs(colors[0] - below.mean(axis=0)).max(axis=1)
    return tuple(colors[0][np.minimum(contrast, 90).argmax()].tolist())


def _render(rng: np.random.Generator, size: int, classes: Sequence[str]):
    """Draw an image; returns it and a list of (class name, (size, size) bool visible mask)."""
    image = _background(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        line = [tuple(p) for p in rng.uniform(0, size, (rng.integers(2, 5), 2))]
        draw.line(line, fill=tuple(rng.integers(0, 256, 3).tolist()), width=rng.integers(1, 4))

    objects = []  # (class or None, full area, visible mask)
    for _ in range(rng.integers(2, 10)):
        distractor = rng.random() < 0.2
        name = rng.choice(list(_DISTRACTORS) if distractor else classes)
        # Log-uniform: as many small objects as large ones, over a factor of 5 in size.
        radius = size * math.exp(rng.uniform(math.log(0.06), math.log(0.32)))
        points = _outline(
            {**_OUTLINES, **_DISTRACTORS}[name],
            rng.uniform(0.05 * size, 0.95 * size, 2),
            radius,
            turn=rng.random() if distractor else rng.uniform(-0.06, 0.06),
            stretch=rng.uniform(0.7, 1),
        )
        mask = Image.new("L", (size * _OVERSAMPLING,) * 2)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        mask = mask.resize((size, size), Image.BOX)
        covered = np.asarray(mask) > 127
        visible = [seen & ~covered for _, _, seen in objects]
        hides = any(v.sum() < _MIN_VISIBLE * o[1] for v, o in zip(visible, objects))
        if covered.sum() < 12 or hides:
            continue
        objects = [(c, area, v) for (c, area, _), v in zip(objects, visible)]
        objects.append((None if distractor else name, covered.sum(), covered))
        # Each class has a typical hue, which not all of its objects have.
        typical = not distractor and rng.random() < 0.7
        hue = CLASSES.index(name) / len(CLASSES) if typical else None
        fill = Image.new("RGB", image.size, _color(rng, np.asarray(image)[covered], hue))
        if rng.random() < 0.2:  # translucent
            mask = mask.point(lambda v: v * 0.75)
        image.paste(fill, mask=mask)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    return image, [(c, seen) for c, _, seen in objects if c is not None]


def _annotation(mask: np.ndarray) -> Dict:
    """The shape of an object in COCO's format, from its (H, W) bool mask."""
    encoded = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": mask_utils.toBbox(encoded).astype(int).tolist(),
        "area": int(mask.sum()),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
    }


def _is_replaceable(path: Path) -> bool:
    """Whether a path is a directory that is empty, or holds a dataset of this module alone."""
    try:
        if not any(path.iterdir()):
            return True
        content = json.loads((path / "instances.json").read_text(encoding="utf-8"))
        is_own = content["info"]["description"].startswith(_DESCRIPTION)
        own = {"images", "instances.json", *(f"images/{x['file_name']}" for x in content["images"])}
        return is_own and {x.relative_to(path).as_posix() for x in path.rglob("*")} <= own
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def make_synthetic_dataset(
    output_dir: str,
    *,
    num_images: int,
    size: int = 160,
    seed: int = 0,
    classes: Sequence[str] = CLASSES[:4],
    image_format: str = "jpg",
) -> Dict:
    """
    Make a dataset: ``output_dir/images/*`` and ``output_dir/instances.json``. Image i depends only
    on the seed and on i. The directory appears when it is complete; a dataset of this function that
    was there is replaced.

    Args:
        output_dir: the directory; its parent is created.
        num_images: 1 to a million.
        size: width and height of the images, 32 to 4096 pixels.
        seed: at least 0. Use another one for held-out images.
        classes: those of :data:`CLASSES` to draw, in the order of their ids.
        image_format: "jpg" or "png".

    Returns:
        the content of ``instances.json``.

    Raises:
        ValueError: if an argument is out of range.
        InputError: if there is anything else, or nothing can be written.
    """
    for name, value, low, high in (
        ("num_images", num_images, 1, 10**6),  # the digits of their names
        ("size", size, 32, 4096),
        ("seed", seed, 0, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    if not classes or len({*classes} & {*CLASSES}) < len(classes):
        raise ValueError(f"classes must be different ones of {CLASSES}, got {(*classes,)}")
    if image_format not in ("jpg", "png"):
        raise ValueError(f"image_format must be 'jpg' or 'png', got {image_format!r}")

    output = Path(os.path.realpath(output_dir))  # a link to a directory stays one
    if output.exists() and not _is_replaceable(output):
        raise InputError(
            f"output_dir: {output_dir} holds files that this program has not written, which would "
            "be deleted: name another directory"
        )
    output_path("output_dir", str(output.parent), {}, is_folder=True)
    dataset = {
        "info": {"description": f"{_DESCRIPTION}, seed {seed}"},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in enumerate(classes, 1)],
    }
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as tmp:
        unfinished = Path(tmp) / "dataset"
        (unfinished / "images").mkdir(parents=True)
        for i in tqdm(range(num_images), desc=output_dir, unit="image"):
            image, objects = _render(np.random.default_rng([seed, i]), size, classes)
            record = {"id": i + 1, "file_name": f"{i:06d}.{image_format}"}
            image.save(unfinished / "images" / record["file_name"], quality=92)
            dataset["images"].append({**record, "width": size, "height": size})
            for name, mask in objects:
                ids = {"id": len(dataset["annotations"]) + 1, "image_id": i + 1}
                dataset["annotations"].append(
                    {
                        **ids,
                        "category_id": classes.index(name) + 1,
                        **_annotation(mask),
                        "iscrowd": 0,
                    }
                )
        (unfinished / "instances.json").write_text(json.dumps(dataset))
        if output.exists():
            os.replace(output, Path(tmp) / "before")
        os.replace(unfinished, output)
    return dataset


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "output_dir", help="directory to create; an earlier dataset of this program is replaced"
    )
    parser.add_argument("--num-images", type=int, default=300, help="default: 300")
    parser.add_argument(
        "--size", type=int, default=160, help="of each side, in pixels; default: 160"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=CLASSES[:4],
        metavar="CLASS",
        help=f"some of {', '.join(CLASSES)}; default: the first four",
    )
    formats = ("jpg", "png")
    parser.add_argument("--image-format", choices=formats, default="jpg", help="default: jpg")
    return parser


def run(args: argparse.Namespace) -> None:
    """Make the dataset."""
    try:
        dataset = make_synthetic_dataset(**vars(args))
    except ValueError as e:
        raise InputError(one_line(e)) from e
    except OSError as e:
        raise InputError(f"{args.output_dir} cannot be written: {e.strerror or one_line(e)}") from e
    num_images, num_objects = (len(dataset[kind]) for kind in ("images", "annotations"))
    print(f"{counted(num_images, 'image')}, {counted(num_objects, 'object')}")


def main(argv: Optional[List[str]] = None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
