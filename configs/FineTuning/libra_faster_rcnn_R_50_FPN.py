# libra_faster_rcnn_R_50_FPN.yaml as LazyConfig.
from fvcore.common.param_scheduler import CosineParamScheduler

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from ..common.libra_faster_rcnn_fpn import dataloader, model, optimizer, train

train.init_checkpoint = "libra://COCO-Detection/libra_faster_rcnn_R_50_FPN_1x"
train.output_dir = "./output/fine_tuning"
train.epochs = 12.0  # each ends with an evaluation
train.eval_period = 0
train.best_metric = "bbox/AP"
train.checkpointer.max_to_keep = 1
train.num_pictures = 8
train.amp.enabled = True

# Small datasets profit from objects of several sizes.
_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.sample_style = (480, 800), "range"
dataloader.train.total_batch_size = 4
optimizer.lr = 0.005  # the published rate, in proportion to the batch size

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.05,  # of the training
    warmup_method="linear",
    warmup_factor=0.001,
)
