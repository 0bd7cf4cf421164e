# SPDX-License-Identifier: Apache-2.0
from .class_names import class_names
from .dataset_cache import (
    cache_coco_json,
    cache_registered,
    load_dataset,
    load_records,
    outline,
    register_cached,
    register_coco_json,
    use_cached,
)
from .dataset_mapper import LibraDatasetMapper
from .image_reading import read_image
from .proposals import prepare_proposals
from .resize import build_augmentation
from .resumable_loader import ResumableLoader

__all__ = [
    "LibraDatasetMapper",
    "ResumableLoader",
    "build_augmentation",
    "cache_coco_json",
    "cache_registered",
    "class_names",
    "load_dataset",
    "load_records",
    "outline",
    "prepare_proposals",
    "read_image",
    "register_cached",
    "register_coco_json",
    "use_cached",
]
