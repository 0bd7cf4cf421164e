# Libra Faster R-CNN R-50 with three box heads, for IoUs of 0.5, 0.6 and 0.7. All of them use
# balanced sampling and balanced L1 loss. The rest is that of mmdetection's Cascade R-CNN. This
# model is not in the paper and has not been trained on COCO.
from libra_d2.lazy import balance

from ..common.cascade_mask_rcnn import dataloader, lr_multiplier, model, optimizer, train

for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_name)
balance(model, reference=True)
