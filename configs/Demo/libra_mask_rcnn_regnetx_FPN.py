# libra_mask_rcnn_R_18_FPN.yaml as a LazyConfig, with the smallest published RegNetX (200 million
# FLOPs for an ImageNet image). It starts from random weights.
from fvcore.common.param_scheduler import CosineParamScheduler

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from detectron2.solver import WarmupParamScheduler

from libra_d2.lazy import balance

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=13,
    w_a=36.44,
    w_0=24,
    w_m=2.49,
    group_width=8,
    freeze_at=0,
    norm="BN",
    out_features=["s1", "s2", "s3", "s4"],
)
model.backbone.norm = "BN"
model.backbone.out_channels = 64
rpn, heads = model.proposal_generator, model.roi_heads
rpn.head.in_channels = 64
rpn.anchor_generator.sizes = [[12], [24], [48], [96], [192]]  # pixels
rpn.batch_size_per_image = 128
rpn.pre_nms_topk = rpn.post_nms_topk = (300, 300)
heads.num_classes = 3
heads.batch_size_per_image = 64
heads.box_head.update(
    input_shape=ShapeSpec(channels=64, height=7, width=7),
    conv_dims=[64, 64],
    conv_norm="BN",
    fc_dims=[256],
)
heads.box_predictor.input_shape = ShapeSpec(channels=256)
heads.mask_head.update(
    input_shape=ShapeSpec(channels=64, height=14, width=14),
    conv_dims=[64, 64, 64],
    conv_norm="BN",
)
balance(model)
del rpn, heads

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations[0].short_edge_length = (160,)
dataloader.train.mapper.instance_mask_format = "bitmask"  # masks are run-length encoded
dataloader.test.mapper.augmentations[0].short_edge_length = 160
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = dataloader.test.num_workers = 1

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.04

train = model_zoo.get_config("common/train.py").train
train.output_dir = "./output/libra_mask_rcnn_regnetx_FPN"
train.max_iter = 720
train.checkpointer.update(period=100, max_to_keep=2)
train.eval_period = 0
train.seed = 1
train.num_pictures = 24

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=50 / train.max_iter,
    warmup_factor=0.001,
)
