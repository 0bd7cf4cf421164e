# Libra Faster R-CNN R-50 with a mask head. This model is not in the paper and has not been trained
# on COCO.
from detectron2 import model_zoo

from libra_d2.lazy import balance

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, torchvision_input, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
torchvision_input(model)
balance(model, reference=True)
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.instance_mask_format = "bitmask"  # as in mmdetection
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-50"
