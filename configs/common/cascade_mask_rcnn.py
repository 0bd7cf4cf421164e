# mmdetection's Cascade Mask R-CNN R-50, before libra_d2.lazy.balance: three box heads, for IoUs of
# 0.5, 0.6 and 0.7, and a mask head.
from detectron2 import model_zoo

from .coco_1x import dataloader, lr_multiplier, optimizer, torchvision_input, train

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.proposal_generator.post_nms_topk = (2000, 1000)
model.proposal_generator.smooth_l1_beta = 1 / 9
_weights = (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)  # inverses of target_stds
model.roi_heads.box_predictors[2].box2box_transform.weights = _weights
torchvision_input(model)
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-50"
