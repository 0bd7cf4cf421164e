# Libra Faster R-CNN R-50 with three box heads, for IoUs of 0.5, 0.6 and 0.7. All of them use
# balanced sampling and balanced L1 loss. The rest is that of mmdetection's Cascade R-CNN. This
# model is not in the paper and has not been trained on COCO.
from detectron2 import model_zoo

from libra_d2.lazy import balance

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, torchvision_input, train

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_name)
model.proposal_generator.post_nms_topk = (2000, 1000)
model.proposal_generator.smooth_l1_beta = 1 / 9
_weights = (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)  # inverses of target_stds
model.roi_heads.box_predictors[2].box2box_transform.weights = _weights
torchvision_input(model)
balance(model, reference=True)
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-50"
