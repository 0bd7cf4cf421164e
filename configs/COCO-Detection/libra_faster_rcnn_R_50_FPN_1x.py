from ..common.libra_faster_rcnn_fpn import dataloader, lr_multiplier, model, optimizer, train
