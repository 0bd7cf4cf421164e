# Base-Libra-RCNN-FPN-mmdet.yaml as a LazyConfig, with ResNet-50.
from detectron2 import model_zoo

from libra_d2.lazy import balance

from .coco_1x import dataloader, lr_multiplier, optimizer, torchvision_input, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_name)
torchvision_input(model)
balance(model, reference=True)
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-50"
