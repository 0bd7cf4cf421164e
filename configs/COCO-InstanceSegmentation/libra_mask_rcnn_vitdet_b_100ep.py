# Detectron2's ViTDet-B (projects/ViTDet) with the ideas of Libra R-CNN. It needs Detectron2's main
# branch and timm. A batch has 64 images. It has not been trained on COCO.
from functools import partial

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler

from libra_d2.lazy import balance

from ..common.coco_lsj import dataloader

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
balance(model)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 184375  # 100 epochs of 118,000 images
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
