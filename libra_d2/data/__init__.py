# SPDX-License-Identifier: Apache-2.0
from .coco_json import register_coco_json
from .dataset_mapper import LibraDatasetMapper

__all__ = ["LibraDatasetMapper", "register_coco_json"]
