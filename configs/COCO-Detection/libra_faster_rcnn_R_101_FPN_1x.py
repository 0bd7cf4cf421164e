from ..common.libra_faster_rcnn_fpn import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-101"
