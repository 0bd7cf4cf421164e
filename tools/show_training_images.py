#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Draw training images and their annotations as the model sees them, augmented and resized.

    python tools/show_training_images.py \
        --config-file configs/FineTuning/libra_faster_rcnn_R_50_FPN.yaml \
        --train-json train.json --train-images images/ OUTPUT_DIR output/fine_tuning

The pictures are saved as OUTPUT_DIR/training_images/*.jpg, and the sizes of the objects in them are
printed. Look at the pictures before training: boxes in the wrong place and wrong class names are
easy to see.
"""

import argparse
import os
from itertools import chain, islice
from typing import Any, Dict, List

import numpy as np
from PIL import Image

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb

from libra_d2.config import check_datasets
from libra_d2.engine import (
    add_data_arguments,
    config_argument_parser,
    prepare_output_dir,
    prepare_proposal_files,
    read_config,
    register_own_data,
    report_errors,
)
from libra_d2.errors import InputError, counted
from libra_d2.evaluation.pictures import picture_scale
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.display import display_metadata
from libra_d2.utils.output_path import output_paths


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = config_argument_parser(__doc__)
    parser.add_argument("--num-images", type=int, default=16, help="default: %(default)s")
    add_data_arguments(parser)
    return parser


def draw(image: Dict[str, Any], image_format: str, metadata: Metadata) -> np.ndarray:
    """A picture of an input of the model with its annotations, (H, W, 3) uint8 RGB."""
    from detectron2.utils.visualizer import Visualizer  # imports OpenCV

    pixels = convert_image_to_rgb(image["image"].permute(1, 2, 0), image_format)
    fields = image["instances"].get_fields()
    classes = fields["gt_classes"].tolist()
    drawn = {"boxes": "gt_boxes", "masks": "gt_masks", "keypoints": "gt_keypoints"}
    return (
        Visualizer(pixels, metadata, picture_scale(pixels, 400))
        .overlay_instances(
            labels=[metadata.thing_classes[i] for i in classes],
            assigned_colors=[np.divide(metadata.thing_colors[i], 255) for i in classes],
            **{name: fields[field] for name, field in drawn.items() if field in fields},
        )
        .get_image()
    )


def run(args: argparse.Namespace) -> None:
    """Draw the first images of a training."""
    if args.num_images < 1:
        raise InputError(f"--num-images is {args.num_images}: use 1 or more")
    recipe = read_config(args.config_file, args.opts)
    prepare_output_dir(recipe)
    register_own_data(recipe, args)
    if not recipe.train_datasets:
        name = recipe.name_of("train_datasets")
        raise InputError(f"no images: use --train-json and --train-images, or set {name}")
    check_datasets(recipe.train_datasets)
    prepare_proposal_files(recipe, ("train",))
    folder = os.path.join(recipe.output_dir, "training_images")
    paths = [os.path.join(folder, f"{i:03d}.jpg") for i in range(args.num_images)]
    images: Dict[str, List[str]] = {}
    if any(map(os.path.exists, paths)):
        for name in recipe.train_datasets:
            files = (record.get("file_name", "") for record in DatasetCatalog.get(name))
            images[f"an image of {name}"] = [x for x in files if x.endswith(".jpg")]
    output_paths(recipe.name_of("output_dir"), paths, images)
    metadata = display_metadata(MetadataCatalog.get(recipe.train_datasets[0]))
    batches = iter(recipe.build_train_loader(max(recipe.seed, 0)))
    sides = []
    for path, image in zip(paths, islice(chain.from_iterable(batches), len(paths))):
        with atomic_write(path) as f:
            picture = draw(image, recipe.image_format, metadata)
            Image.fromarray(picture).save(f, "JPEG", quality=92)
        sides += image["instances"].gt_boxes.area().sqrt().tolist()
    print(f"{counted(len(paths), 'image')}: {folder}")
    if sides:
        small, middle, large = np.percentile(sides, (5, 50, 95))
        print(
            f"{counted(len(sides), 'object')}; square roots of their areas: median {middle:.0f} "
            f"pixels, 90% of them between {small:.0f} and {large:.0f}"
        )


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
