# SPDX-License-Identifier: Apache-2.0
from .class_names import class_names
from .coco_json import register_coco_json
from .dataset_mapper import LibraDatasetMapper
from .image_reading import read_image
from .proposals import prepare_proposals
from .resize import build_augmentation
from .resumable_loader import ResumableLoader

__all__ = [
    "LibraDatasetMapper",
    "ResumableLoader",
    "build_augmentation",
    "class_names",
    "prepare_proposals",
    "read_image",
    "register_coco_json",
]
