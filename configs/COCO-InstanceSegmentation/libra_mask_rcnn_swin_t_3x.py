# Libra Mask R-CNN with Swin-T and the training recipe of
# github.com/SwinTransformer/Swin-Transformer-Object-Detection. It needs Detectron2's main branch
# and timm. It has not been trained on COCO.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from libra_d2.lazy import balance

from ..common.adamw_3x import dataloader, imagenet_input, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    drop_path_rate=0.2,
    out_indices=(0, 1, 2, 3),
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
imagenet_input(model)
balance(model)

optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_tiny_patch4_window7_224.pth?matching_heuristics=True"
)
