from detectron2 import model_zoo

from libra_d2.lazy import balance

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, torchvision_input, train

model = model_zoo.get_config("common/models/retinanet.py").model
torchvision_input(model)
balance(model, reference=True)
model.smooth_l1_beta = 0.1  # used by the plain detector, without balanced L1 loss
optimizer.lr = 0.01
train.init_checkpoint = "libra://ImageNetPretrained/torchvision/R-50"
