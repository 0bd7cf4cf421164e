# SPDX-License-Identifier: Apache-2.0
from .coco_json import class_colors, register_coco_json
from .dataset_mapper import LibraDatasetMapper, build_mapper
from .image_reading import read_image
from .proposals import prepare_proposals
from .resize import build_augmentation, check_interpolation

__all__ = [
    "LibraDatasetMapper",
    "build_augmentation",
    "build_mapper",
    "check_interpolation",
    "class_colors",
    "prepare_proposals",
    "read_image",
    "register_coco_json",
]
