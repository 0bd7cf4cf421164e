# SPDX-License-Identifier: Apache-2.0
from .coco_json import register_coco_json
from .dataset_mapper import LibraDatasetMapper
from .proposals import prepare_proposals

__all__ = ["LibraDatasetMapper", "prepare_proposals", "register_coco_json"]
