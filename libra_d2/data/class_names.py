# SPDX-License-Identifier: Apache-2.0
from typing import Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["class_names"]


def class_names(dataset_name: str) -> Tuple[str, ...]:
    """
    The names of the classes of a registered dataset, which is loaded if they are not known before;
    empty if it does not say.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset_name)  # such as those of register_coco_instances
    return tuple(metadata.get("thing_classes") or ())
