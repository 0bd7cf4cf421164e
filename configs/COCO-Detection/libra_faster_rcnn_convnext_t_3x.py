# Libra Faster R-CNN with timm's ConvNeXt-T (`pip install timm`). It uses the training recipe for
# detection of github.com/facebookresearch/ConvNeXt, except for its layer-wise learning rates. It
# has not been trained on COCO.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from libra_d2.lazy import balance
from libra_d2.modeling import TimmBackbone

from ..common.adamw_3x import dataloader, imagenet_input, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_name)
model.backbone.bottom_up = L(TimmBackbone)(
    name="convnext_tiny", out_features=["res2", "res3", "res4", "res5"], drop_path_rate=0.4
)
imagenet_input(model)
balance(model)

dataloader.train.mapper.use_instance_mask = False
optimizer.params.overrides = {"gamma": {"weight_decay": 0.0}, "bias": {"weight_decay": 0.0}}
train.init_checkpoint = "https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth"
