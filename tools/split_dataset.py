#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Split a COCO JSON into training and validation images at random.

    python tools/split_dataset.py all.json --val-share 0.2 \
        --train-output train.json --val-output val.json

Photographs of the same scene should not be in both parts, because the validation would then measure
what the model has memorized. --group-by takes a regular expression that is searched in the file
names. Images in which it matches the same text stay together: '^[^_]+' groups kitchen_01.jpg and
kitchen_02.jpg.
"""

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from typing import Any, Dict, List, Optional, Set, Tuple

from detectron2.utils.logger import setup_logger

from libra_d2.data.coco_json import log_changes, read_coco_json
from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError, counted
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.display import display_name
from libra_d2.utils.output_path import output_paths


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = argument_parser(__doc__)
    parser.add_argument("json", metavar="FILE", help="annotations in COCO format")
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.2,
        help="share of the images to validate on; default: %(default)s",
    )
    parser.add_argument("--group-by", metavar="REGEX", help="images to keep together, see above")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--train-output", required=True, metavar="FILE")
    parser.add_argument("--val-output", required=True, metavar="FILE")
    return parser


def group(names: Dict[Any, str], pattern: Optional[str]) -> List[List]:
    """
    The ids of images that stay together.

    Args:
        names: file name by image id.
        pattern: see above; names that it does not match are groups of their own.
    """
    groups: Dict[Tuple, List] = defaultdict(list)
    for image_id, name in names.items():
        match = re.search(pattern, name) if pattern else None
        groups[("group", match.group()) if match else ("image", image_id)].append(image_id)
    return [*groups.values()]


def choose(groups: List[List], share: float, rng: random.Random) -> Set[Any]:
    """About this share, in (0, 1), of the images: whole groups at a time and at least one."""
    chosen: Set[Any] = set()
    num_images = sum(map(len, groups))
    for ids in rng.sample(groups, len(groups)):
        if not chosen or len(chosen) + len(ids) / 2 <= share * num_images:
            chosen.update(ids)
    return chosen


def part(dataset: Dict[str, Any], images: Set[Any]) -> Dict[str, Any]:
    """The COCO JSON of some of the images of a dataset."""
    return {
        **dataset,
        "images": [x for x in dataset["images"] if x["id"] in images],
        "annotations": [x for x in dataset["annotations"] if x["image_id"] in images],
    }


def run(args: argparse.Namespace) -> None:
    """Read, split and write."""
    if not 0 < args.val_share < 1:
        raise InputError(f"--val-share is {args.val_share}: use a value between 0 and 1")
    try:
        re.compile(args.group_by or "")
    except re.error as e:
        raise InputError(f"--group-by: {args.group_by} is no regular expression: {e}") from e
    outputs = [args.train_output, args.val_output]
    output_paths("--train-output, --val-output", outputs, {"the dataset": args.json})
    setup_logger(name="libra_d2")
    dataset, changes = read_coco_json(args.json)
    log_changes(args.json, changes)
    names = {x["id"]: x["file_name"] for x in dataset["images"]}
    groups = group(names, args.group_by)
    if len(groups) == 1:
        raise InputError(f"{args.json}: its {len(names)} images are one group: nothing to split")
    val = choose(groups, args.val_share, random.Random(args.seed))
    if len(val) == len(names):
        raise InputError(
            f"--val-share {args.val_share} leaves none of the {len(names)} images to train on: use "
            "a smaller share"
        )
    for path, ids in zip(outputs, (names.keys() - val, val)):
        split = part(dataset, ids)
        with atomic_write(path, "w") as f:
            try:
                json.dump(split, f, allow_nan=False)
            except ValueError as e:  # in a part that is not checked, such as a polygon
                raise InputError(f"{args.json}: it has a number that is NaN or infinite") from e
        count = Counter(x["category_id"] for x in split["annotations"] if not x["iscrowd"])
        classes = [(display_name(x["name"]), count[x["id"]]) for x in dataset["categories"]]
        numbers = ", ".join(f"{name} {number}" for name, number in classes)
        print(f"{path}: {counted(len(ids), 'image')}; objects: {numbers}")
        for name in (name for name, number in classes if not number):
            print(f"warning: {path} has no object of the class {name}: try another --seed")


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
