# The training recipe of the Swin and ConvNeXt projects: AdamW, 36 epochs of COCO with 16 images in
# each batch, and images with a shorter side of 480 to 800 pixels.
import torch
from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params

_EPOCH = 7330  # iterations

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations[0].short_edge_length = tuple(range(480, 801, 32))

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 36 * _EPOCH
train.amp.enabled = True

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[27 * _EPOCH, 33 * _EPOCH],
        num_updates=train.max_iter,
    ),
    warmup_length=1000 / train.max_iter,
    warmup_factor=0.001,
)


def imagenet_input(model):
    """Use RGB images, normalized as for torchvision's and timm's ImageNet models."""
    model.pixel_mean = [123.675, 116.280, 103.530]
    model.pixel_std = [58.395, 57.120, 57.375]
    model.input_format = "RGB"
