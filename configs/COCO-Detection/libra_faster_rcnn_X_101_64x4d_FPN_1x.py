from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BottleneckBlock, ResNet

from ..common.libra_faster_rcnn_fpn import dataloader, lr_multiplier, model, optimizer, train

# The bottlenecks are as wide as the output. make_default_stages() has no argument for this.
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=num_blocks,
        in_channels=64 if i == 0 else 128 * 2**i,
        out_channels=256 * 2**i,
        bottleneck_channels=256 * 2**i,
        stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
        num_groups=64,
        stride_in_1x1=False,
        norm="FrozenBN",
    )
    for i, num_blocks in enumerate((3, 4, 23, 3))
]
train.init_checkpoint = "libra://ImageNetPretrained/open-mmlab/X-101-64x4d"
