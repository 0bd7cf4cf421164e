# Libra Cascade R-CNN R-50 with a mask head for each of its three stages, as in mmdetection. This
# model is not in the paper and has not been trained on COCO.
from libra_d2.lazy import balance

from ..common.cascade_mask_rcnn import dataloader, lr_multiplier, model, optimizer, train

balance(model, reference=True)
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.instance_mask_format = "bitmask"  # as in mmdetection
