#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Show where a detector loses AP, and where a second one gains or loses on the same images: by type of
error, IoU, size and crowdedness of the objects, class and image.

    python tools/analyze_errors.py --val-json val.json --output output/errors \
        --results output/plain/inference/coco_instances_results.json \
        --results-b output/libra/inference/coco_instances_results.json

writes errors.md, errors.json with all numbers, and, if Plotly is installed, index.html: a page with
charts, tables to sort and, with --val-images, the images and all boxes. The results of any detector
in COCO's format can be compared. If a model was trained several times, name the results of all
runs, those with the same seed at the same place of --results and --results-b.
"""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from itertools import chain
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from tabulate import tabulate

from libra_d2.data.coco_json import log_changes, read_coco_json
from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError
from libra_d2.evaluation.comparison import compare_objects
from libra_d2.evaluation.detection_errors import ERROR_TYPES
from libra_d2.evaluation.detection_metrics import ERROR_METRICS, METRICS, DetectionMetrics
from libra_d2.evaluation.error_page import write_error_page
from libra_d2.evaluation.matching import IOU_TYPES, Matches, match_detections, read_results
from libra_d2.evaluation.runs import compare_models
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.display import table_cell
from libra_d2.utils.output_path import output_path, output_paths

NUM_IMAGES = 10  # in the table of those that differ most


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = argument_parser(__doc__)
    runs = {"nargs": "+", "metavar": "FILE"}
    parser.add_argument("--results", required=True, help="of the first model", **runs)
    parser.add_argument("--results-b", default=[], help="of a second model", **runs)
    parser.add_argument("--val-json", required=True, metavar="FILE", help="annotations")
    parser.add_argument("--val-images", metavar="DIR", help="images, for the page")
    parser.add_argument("--max-images", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--iou-type", choices=IOU_TYPES, default="bbox", help="default: bbox")
    parser.add_argument("--output", required=True, metavar="DIR")
    return parser


def cell(value: Any) -> str:
    """A number in percent, or text, as a cell of a table."""
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def count(value: Optional[float]) -> str:
    """A number of things, which has a decimal only if it is the mean of several runs."""
    return "" if value is None else f"{round(value, 1):,.10g}"


def table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    return tabulate(
        [list(map(cell, row)) for row in rows], headers, "github", disable_numparse=True
    )


def describe_model(numbers: Dict[str, Any]) -> List[str]:
    """Tables of one model, see :func:`describe_runs`."""
    metrics, counts = numbers["metrics"], numbers["errors"]
    by_iou = METRICS[: METRICS.index("AR") + 1]
    errors = [
        (name, count(counts.get(kind)), metrics[name])
        for name, kind in zip(ERROR_METRICS, (*ERROR_TYPES, None, None))
    ]
    ranges = [
        (name, count(x["objects"]), count(x["missed"]), x["AP"], x["AR"])
        for name, x in numbers["ranges"].items()
    ]
    classes = [
        (table_cell(k), count(x["objects"]), x["AP"], x["AP50"])
        for k, x in numbers["classes"].items()
    ]
    parts = [
        table(by_iou, [[metrics[name] for name in by_iou]]),
        table(["", "number", "AP50 gained by fixing them"], errors),
        table(["objects", "number", "missed", "AP", "AR"], ranges),
        table(["class", "objects", "AP", "AP50"], classes),
    ]
    if numbers["calibration"]:
        error = numbers["calibration"]["expected calibration error"]
        bins = numbers["calibration"]["bins"]
        rows = [(count(x["detections"]), x["score"], x["precision"]) for x in bins]
        parts.append(f"Scores and precision differ by {error:.1f} % (expected calibration error).")
        parts.append(table(["detections", "mean score", "precision"], rows))
    return parts


def describe_comparison(comparison: Dict[str, Any]) -> List[str]:
    """Tables of the differences of two models, see :func:`compare_models`."""
    chance = {
        True: "The intervals reflect the choice of the images only, not of the training.",
        False: f"Values are means of {comparison['pairs']} pairs of runs. The intervals hold for "
        "trainings with other seeds, evaluated on the same images.",
    }[comparison["pairs"] == 1]
    rows = []
    for x in comparison["metrics"]:
        interval = "" if x["low"] is None else f"{x['low']:+.1f} to {x['high']:+.1f}"
        difference = "" if x["difference"] is None else f"{x['difference']:+.1f}"
        rows.append((x["metric"], x["a"], x["b"], difference, interval, x["says"]))
    only = (sum(x[k] for x in comparison["images"]) for k in ("only_a", "only_b"))
    only_a, only_b = map(count, only)
    worst = [x for x in comparison["images"] if x["difference"] is not None]
    ends = worst if len(worst) <= 2 * NUM_IMAGES else worst[:NUM_IMAGES] + worst[-NUM_IMAGES:]
    headers = ["", "A", "B", "B less A", "95% confidence interval", "which says that B"]
    return [
        table(headers, rows),
        "The last column is corrected for the number of rows. Of errors, fewer are better. "
        + chance,
        f"A alone finds {only_a} objects, B alone {only_b}.",
        table(
            ["image id", "AP of A", "AP of B", "B less A", "only A finds", "only B finds"],
            [
                (table_cell(x["image_id"]), x["a"], x["b"], x["difference"])
                + (count(x["only_a"]), count(x["only_b"]))
                for x in ends
            ],
        ),
    ]


def warn_of_empty_images(path: str, m: Matches) -> None:
    """Print a warning if results have nothing on more than half of the images with objects."""
    images = np.unique(m.object_image[m.object_counts[0]])
    num_empty = len(np.setdiff1d(images, m.image))
    if num_empty > len(images) / 2:
        print(
            f"warning: {path}: {num_empty} of {len(images)} images with objects have no "
            "detections: were all images evaluated?",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> None:
    """Read, analyze and write."""
    if args.max_images < 0:
        raise InputError(f"--max-images {args.max_images}: use 0 or more")
    if args.val_images is not None and not os.path.isdir(args.val_images):
        raise InputError(f"--val-images: {args.val_images}: no such directory")
    sides = [x for x in (args.results, args.results_b) if x]
    if len(set(map(len, sides))) > 1:
        raise InputError(
            f"--results-b names {len(args.results_b)} files, but --results {len(args.results)}: "
            "name as many runs of both models"
        )
    for option, side in zip(("--results", "--results-b"), sides):
        if len(set(map(os.path.realpath, side))) < len(side):
            raise InputError(f"{option} names the same file twice: name each run once")
    inputs = {f"--results[{i}]": x for i, x in enumerate(args.results)}
    inputs.update({f"--results-b[{i}]": x for i, x in enumerate(args.results_b)})
    output_path("--output", args.output, {}, is_folder=True)
    files = [os.path.join(args.output, name) for name in ("errors.json", "errors.md", "index.html")]
    output_paths("--output", files, {**inputs, "--val-json": args.val_json})
    masks = "bitmask" if args.iou_type == "segm" else None
    dataset, changes = read_coco_json(args.val_json, masks)
    log_changes(args.val_json, changes)
    if args.val_images is not None:
        first = os.path.join(args.val_images, dataset["images"][0]["file_name"])
        if not os.path.isfile(first):
            raise InputError(f"--val-images: {first}: no such image; {args.val_json} names it")
    results = [[read_results(x) for x in side] for side in sides]
    models = [
        [
            DetectionMetrics(match_detections(dataset, own, args.iou_type, name=x))
            for x, own in zip(side, found)
        ]
        for side, found in zip(sides, results)
    ]
    for path, model in zip(chain(*sides), chain(*models)):
        warn_of_empty_images(path, model.matches)
    numbers: Dict[str, Any] = {"val_json": args.val_json, "iou_type": args.iou_type}
    numbers.update(compare_models([dict(enumerate(runs)) for runs in models]))
    lines = [f"# Errors of {args.iou_type} on `{args.val_json}`, in percent"]
    for letter, paths, model in zip("AB", sides, numbers["models"]):
        model["results"] = paths
        names = ", ".join(f"`{x}`" for x in paths)
        lines += [f"## {letter}: {names}", *describe_model(model)]
    for comparison, (a, b) in zip(numbers["comparisons"], [models] if args.results_b else []):
        comparison["objects"] = compare_objects(a[0], b[0])
        lines[1:1] = ["## B, compared with A", *describe_comparison(comparison)]
    with atomic_write(files[0], "w") as f:
        json.dump(numbers, f, allow_nan=False)
    with atomic_write(files[1], "w") as f:
        f.write("\n\n".join(lines) + "\n")
    print(files[1])
    if find_spec("plotly") is None:
        print('index.html is not written; for it, run pip install "libra_d2[report]"')
        return
    write_error_page(
        *(files[2], numbers, dataset, [x[0] for x in models], [x[0] for x in results]),
        names=[", ".join(x) for x in sides],
        title=f"Errors of {args.iou_type} on {args.val_json}",
        image_root=args.val_images,
        max_images=args.max_images,
    )
    print(files[2])


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
