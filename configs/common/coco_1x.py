# Base-COCO-1x.yaml as a LazyConfig: data, input and schedule of the published models.
from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from libra_d2.data.resize import OpenCVResizeShortestEdge

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations[0] = L(OpenCVResizeShortestEdge)(
    short_edge_length=(800,), max_size=1333, sample_style="choice"
)
dataloader.test.mapper.augmentations[0] = L(OpenCVResizeShortestEdge)(
    short_edge_length=800, max_size=1333
)
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False

optimizer = model_zoo.get_config("common/optim.py").SGD

train = model_zoo.get_config("common/train.py").train
train.max_iter = 87960  # 12 epochs of 7330 iterations of 16 images
train.seed = -1

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.1**2],
        milestones=[58640, 80630],  # after epochs 8 and 11
        num_updates=train.max_iter,  # the schedule scales with train.max_iter
    ),
    warmup_length=499 / 87960,
    warmup_method="linear",
    warmup_factor=0.001,
)


def torchvision_input(model):
    """Use the input and strides of torchvision's ImageNet models; freeze the first layers."""
    model.pixel_mean = [123.675, 116.280, 103.530]
    model.pixel_std = [58.395, 57.120, 57.375]
    model.input_format = "RGB"
    model.backbone.bottom_up.freeze_at = 2  # stem and res2
    model.backbone.bottom_up.stages.stride_in_1x1 = False
